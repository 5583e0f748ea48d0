/* AMX tiles: eight registers of 16 rows x 64 bytes. */
#pragma once
#include <immintrin.h>
#include <stdint.h>

enum { TILE = 16, DEPTH = 32, TILE_BYTES = 1024, TILE_FLOATS = 256 };

/* Written out, because compilers' own intrinsics may not say that they read memory, and stores before them get lost. */
#define tile_load(tile, from, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #tile ::"r"(from), "r"((int64_t)(stride)) : "memory")
#define tile_store(tile, to, stride) \
    __asm__ volatile("tilestored %%tmm" #tile ", (%0,%1,1)" ::"r"(to), "r"((int64_t)(stride)) : "memory")
#define tile_zero(tile) __asm__ volatile("tilezero %%tmm" #tile ::)
#define tile_multiply(sum, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #sum ::)

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_per_row[16];
    uint8_t rows[16];
} __attribute__((aligned(64))) TileConfig;

/* Makes all tiles full size for this thread; `before` gets what was configured. */
static inline void tiles_begin(TileConfig *before) {
    TileConfig config = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        config.bytes_per_row[tile] = 64;
        config.rows[tile] = TILE;
    }
    __asm__ volatile("sttilecfg %0" : "=m"(*before)::"memory");
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
}

/* Other libraries may rely on the tiles being configured as they left them. */
static inline void tiles_end(const TileConfig *before) {
    if (before->palette)
        __asm__ volatile("ldtilecfg %0" ::"m"(*before) : "memory");
    else
        __asm__ volatile("tilerelease" ::: "memory");
}
