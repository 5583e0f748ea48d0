/* y = x W^T + b for bfloat16 on AMX tiles, for one token as for thousands.
 *
 * W [n, k] is packed once, at load, into tiles of 16 columns x 32 depths, laid out as the tile multiply wants its second
 * operand: tile (i, s) holds, for depth pairs r = 0..15 and columns c = 0..15, W[16 i + c][32 s + 2 r, + 1]. Tiles of one
 * i lie one after another, so a step streams the weights once, in address order. Columns are padded to a multiple of 32.
 *
 * Every element of y is a float32 sum over the depth in one fixed order, whatever the number of rows or threads: a row's
 * result does not depend on its batch.
 */
#include "tiles.h"
#include "vector.h"
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { ROW_BLOCK = 512, STEP_BLOCK = 32 }; /* rows x depth of x kept in the L2 cache: 512 x 1024 numbers, 1 MiB */
enum { PREFETCH = 8 * TILE_BYTES };

/* Asks the kernel for the tile registers, once per process. Returns whether they may be used. */
int allow_tiles(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}

/* 16 rows of weights, k / 2 pairs each, to one row of tiles: 16 x 16 pairs at a time, transposed in registers. */
static void pack_16(const uint32_t *rows, uint32_t *out, int64_t pairs) {
    for (int64_t p = 0; p < pairs; p += TILE) {
        __m512i words[TILE];
        for (int64_t c = 0; c < TILE; c++)
            words[c] = _mm512_loadu_si512(rows + c * pairs + p);
        transpose(words);
        for (int64_t r = 0; r < TILE; r++)
            _mm512_store_si512(out + (p + r) * TILE, words[r]);
    }
}

/* Rows first .. first + rows - 1 of W, from weight [rows, k], to their places in packed [n / 16 (rounded up to even),
 * k / 32, 16, 32]. Of rows beyond n nothing is written. */
int pack_weight(const uint16_t *weight, uint16_t *packed, int64_t first, int64_t rows, int64_t k, int threads) {
    int64_t pairs = k / 2, last = first + rows;
#pragma omp parallel for num_threads(threads)
    for (int64_t tile = first / TILE; tile <= (last - 1) / TILE; tile++) {
        uint32_t *out = (uint32_t *)packed + tile * pairs * TILE;
        const uint32_t *from = (const uint32_t *)weight + (tile * TILE - first) * pairs;
        if (tile * TILE >= first && (tile + 1) * TILE <= last) {
            pack_16(from, out, pairs);
            continue;
        }
        for (int64_t c = 0; c < TILE; c++)
            for (int64_t p = 0; p < pairs && tile * TILE + c >= first && tile * TILE + c < last; p++)
                out[p * TILE + c] = from[c * pairs + p];
    }
    return 0;
}

/* 16 rows of x as consecutive tiles of 16 rows x 32 depths; rows beyond m are zeros. */
static void pack_rows(const uint16_t *x, uint8_t *tiles, int64_t first, int64_t m, int64_t k) {
    for (int64_t r = 0; r < TILE; r++) {
        const uint8_t *row = (const uint8_t *)(x + (first + r) * k);
        for (int64_t s = 0; s < k / DEPTH; s++) {
            __m512i part = first + r < m ? _mm512_loadu_si512(row + s * 64) : _mm512_setzero_si512();
            _mm512_store_si512(tiles + s * TILE_BYTES + r * 64, part);
        }
    }
}

/* sums[a][b] += x tile row a times weight tile row b over `steps` tiles of depth; one or two tile rows of x. */
static inline void multiply(const uint8_t *x0, const uint8_t *x1, const uint8_t *w0, const uint8_t *w1, int64_t steps,
                            float *sums, int is_first) {
    if (is_first) {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
    } else {
        tile_load(0, sums, 64);
        tile_load(1, sums + 256, 64);
        if (x1) {
            tile_load(2, sums + 512, 64);
            tile_load(3, sums + 768, 64);
        }
    }
    for (int64_t s = 0; s < steps; s++) {
        if (!x1)
            for (int line = 0; line < TILE_BYTES; line += 64) {
                _mm_prefetch(w0 + s * TILE_BYTES + PREFETCH + line, _MM_HINT_T0);
                _mm_prefetch(w1 + s * TILE_BYTES + PREFETCH + line, _MM_HINT_T0);
            }
        tile_load(4, x0 + s * TILE_BYTES, 64);
        tile_load(6, w0 + s * TILE_BYTES, 64);
        tile_multiply(0, 4, 6);
        tile_load(7, w1 + s * TILE_BYTES, 64);
        tile_multiply(1, 4, 7);
        if (x1) {
            tile_load(5, x1 + s * TILE_BYTES, 64);
            tile_multiply(2, 5, 6);
            tile_multiply(3, 5, 7);
        }
    }
    tile_store(0, sums, 64);
    tile_store(1, sums + 256, 64);
    if (x1) {
        tile_store(2, sums + 512, 64);
        tile_store(3, sums + 768, 64);
    }
}

/* One 16 x 16 tile of sums into y, with the bias, rounded to nearest even. */
static void finish(const float *sums, const uint16_t *bias, uint16_t *y, int64_t row, int64_t col, int64_t m, int64_t n) {
    if (col >= n)
        return;
    __mmask16 mask = n - col >= TILE ? 0xFFFF : (__mmask16)((1 << (n - col)) - 1);
    __m512 shift = _mm512_setzero_ps();
    if (bias) {
        __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bias + col));
        shift = _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    for (int64_t r = 0; r < TILE && row + r < m; r++) {
        __m512 sum = _mm512_add_ps(_mm512_load_ps(sums + r * TILE), shift);
        _mm256_mask_storeu_epi16(y + (row + r) * n + col, mask, (__m256i)_mm512_cvtneps_pbh(sum));
    }
}

/* Grows with the largest step a thread has seen, and lives as long as the thread. */
static void *scratch(int which, size_t size) {
    static __thread struct {
        void *memory;
        size_t size;
    } held[2];
    if (held[which].size < size) {
        free(held[which].memory);
        held[which].memory = aligned_alloc(64, size);
        held[which].size = held[which].memory ? size : 0;
    }
    return held[which].memory;
}

/* Rows of x in the order of its tiles, this thread's share of them or, for a thread of its own, all. */
static void pack_tiles(const uint16_t *x, uint8_t *tiles, int64_t first, int64_t rows, int64_t m, int64_t k, int is_own) {
    int64_t size = k / DEPTH * TILE_BYTES;
    if (is_own) {
        for (int64_t t = 0; t < rows; t++)
            pack_rows(x, tiles + t * size, first + t * TILE, m, k);
        return;
    }
#pragma omp for schedule(static)
    for (int64_t t = 0; t < rows; t++)
        pack_rows(x, tiles + t * size, first + t * TILE, m, k);
}

/* x [m, k], packed as above, bias [n] or null, y [m, n]. Returns 0, or -1 without memory. */
int linear(const uint16_t *x, const uint16_t *packed, const uint16_t *bias, uint16_t *y, int64_t m, int64_t n, int64_t k,
           int threads) {
    int64_t steps = k / DEPTH, pairs = (n + 2 * TILE - 1) / (2 * TILE), turn = pairs / (8 * threads) + 1;
    int64_t most_rows = m < ROW_BLOCK ? (m + TILE - 1) / TILE : ROW_BLOCK / TILE;
    int64_t row_pairs = (most_rows + 1) / 2, block = steps;
    int is_own = most_rows <= 2, failed = 0; /* few rows: packing them in every thread is cheaper than waiting for others */
    uint8_t *shared = is_own ? NULL : scratch(0, most_rows * steps * TILE_BYTES);
    float *partial = NULL;
    if (steps > STEP_BLOCK && !is_own) {
        block = STEP_BLOCK;
        partial = scratch(1, pairs * row_pairs * 4 * TILE_BYTES);
    }
    if ((!is_own && !shared) || (block < steps && !partial))
        return -1;
#pragma omp parallel num_threads(threads)
    {
        TileConfig before;
        float local[4 * TILE_FLOATS] __attribute__((aligned(64)));
        uint8_t *tiles = is_own ? scratch(0, most_rows * steps * TILE_BYTES) : shared;
        if (!tiles)
            failed = 1;
        tiles_begin(&before);
        for (int64_t first = 0; first < m; first += ROW_BLOCK) {
            int64_t rows = m - first < ROW_BLOCK ? (m - first + TILE - 1) / TILE : ROW_BLOCK / TILE;
            if (tiles)
                pack_tiles(x, tiles, first, rows, m, k, is_own);
            for (int64_t s = 0; s < steps; s += block) {
                int64_t count = steps - s < block ? steps - s : block;
                int is_last = s + count == steps;
#pragma omp for schedule(dynamic, turn)
                for (int64_t p = 0; p < pairs; p++) {
                    const uint8_t *w = (const uint8_t *)packed + (2 * p * steps + s) * TILE_BYTES;
                    for (int64_t t = 0; t < rows && tiles; t += 2) {
                        const uint8_t *x0 = tiles + (t * steps + s) * TILE_BYTES;
                        const uint8_t *x1 = t + 1 < rows ? x0 + steps * TILE_BYTES : NULL;
                        float *sums = partial ? partial + (p * row_pairs + t / 2) * 4 * TILE_FLOATS : local;
                        multiply(x0, x1, w, w + steps * TILE_BYTES, count, sums, s == 0);
                        if (!is_last)
                            continue;
                        for (int q = 0; q < (x1 ? 4 : 2); q++)
                            finish(sums + TILE_FLOATS * q, bias, y, first + (t + q / 2) * TILE, (2 * p + q % 2) * TILE, m, n);
                    }
                }
            }
        }
        tiles_end(&before);
    }
    return failed ? -1 : 0;
}
