/* Attention of a ragged batch over paged bfloat16 keys and values, on AMX tiles; prefill chunks and decode steps alike.
 *
 * A task is one sequence, one KV head and up to 64 query rows (row = token x group + head of the group). Per 64 keys:
 *
 *     scores [key, row] = K Q^T         K tiles straight from the KV memory, Q packed once per task
 *     softmax            running maximum and sum per row (online softmax, arXiv:1805.02867), 16 rows to a register
 *     out [row, dim]   += P V           P transposed to bfloat16 rows, V with pairs of keys interleaved
 *
 * Keys are taken 64 at a time from a multiple of 64 on, whatever the chunk, batch or thread: blocks that a row does not
 * see change nothing in it, so a row's result is the same in any batch and chunk.
 *
 * Needs head_dim and block_size to be multiples of 32 and 16, and head_dim of 256 at most.
 */
#include "tiles.h"
#include "vector.h"
#include <math.h>
#include <string.h>

enum { KEYS = 64, ROW_TILES = 4, MAX_DIM = 256 };

typedef struct {
    const uint16_t *query; /* [tokens, heads, dim], tokens query_stride apart */
    const uint16_t *kv;    /* the layer's keys of block 0; [.., block_size, kv_heads, dim] */
    uint16_t *out;         /* [tokens, heads, dim] */
    const int64_t *query_starts, *positions, *block_table; /* [rows + 1], [rows], [rows, table_width] */
    int64_t query_stride, block_stride, value_offset, table_width;
    int64_t rows, heads, kv_heads, dim, block_size, window;
    float scale;
} Batch;

/* One task's state; two of its tiles' worth of everything fits the L2 cache. */
typedef struct {
    uint32_t query[ROW_TILES][MAX_DIM / 2][TILE];
    uint16_t value[KEYS / DEPTH][MAX_DIM / TILE][TILE][DEPTH];
    float out[ROW_TILES][MAX_DIM / TILE][TILE_FLOATS];
    float scores[KEYS][TILE];
    uint32_t pairs[KEYS / DEPTH][TILE][TILE];
    float maximum[ROW_TILES][TILE], sum[ROW_TILES][TILE];
    int32_t position[ROW_TILES][TILE];
} __attribute__((aligned(64))) Work;

static inline __m512i bf16_bits(__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }

/* Query rows first_row.. of one sequence and KV head, as tile operands; missing rows are zeros that see nothing. */
static int load_queries(const Batch *b, Work *w, int64_t row, int64_t head, int64_t first_row, int64_t num_rows) {
    int64_t group = b->heads / b->kv_heads;
    int tiles = (int)((num_rows + TILE - 1) / TILE);
    for (int64_t i = 0; i < tiles * TILE; i++) {
        int64_t token = (first_row + i) / group, of_group = (first_row + i) % group;
        uint32_t(*out)[TILE] = w->query[i / TILE];
        w->position[i / TILE][i % TILE] = i < num_rows ? (int32_t)(b->positions[row] + token) : -1;
        w->maximum[i / TILE][i % TILE] = -1e30f;
        w->sum[i / TILE][i % TILE] = 0;
        const uint32_t *from = (const uint32_t *)(b->query + (b->query_starts[row] + token) * b->query_stride +
                                                  (head * group + of_group) * b->dim);
        for (int64_t d = 0; d < b->dim / 2; d++)
            out[d][i % TILE] = i < num_rows ? from[d] : 0;
    }
    for (int t = 0; t < tiles; t++)
        memset(w->out[t], 0, b->dim / TILE * TILE_BYTES);
    return tiles;
}

static inline const uint16_t *key_tile(const Batch *b, int64_t row, int64_t head, int64_t position) {
    int64_t block = b->block_table[row * b->table_width + position / b->block_size];
    return b->kv + block * b->block_stride + (position % b->block_size * b->kv_heads + head) * b->dim;
}

/* Blocks lie anywhere, so no hardware prefetcher finds the next keys and values in time. */
static void prefetch(const Batch *b, int64_t row, int64_t head, int64_t first, int64_t last) {
    int64_t stride = b->kv_heads * b->dim;
    for (int64_t key = first; key <= last && key < first + KEYS; key += TILE) {
        const uint16_t *tile = key_tile(b, row, head, key);
        for (int64_t i = 0; i < TILE; i++)
            for (int64_t d = 0; d < b->dim; d += DEPTH) {
                _mm_prefetch(tile + i * stride + d, _MM_HINT_T0);
                _mm_prefetch(tile + b->value_offset + i * stride + d, _MM_HINT_T0);
            }
    }
}

/* Interleaves pairs of keys' values. Within 32 dims, columns are in the order that unpacking leaves (see store_rows). */
static void load_values(const Batch *b, Work *w, const uint16_t *const *tiles, int64_t num_keys) {
    int64_t stride = b->kv_heads * b->dim;
    for (int64_t p = 0; p < KEYS / 2; p++) {
        const uint16_t *even = tiles[2 * p / TILE] + b->value_offset + 2 * p % TILE * stride, *odd = even + stride;
        for (int64_t d = 0; d < b->dim; d += DEPTH) {
            __m512i zero = _mm512_setzero_si512();
            __m512i v0 = 2 * p < num_keys ? _mm512_loadu_si512(even + d) : zero;
            __m512i v1 = 2 * p + 1 < num_keys ? _mm512_loadu_si512(odd + d) : zero;
            _mm512_store_si512(w->value[p / TILE][d / TILE][p % TILE], _mm512_unpacklo_epi16(v0, v1));
            _mm512_store_si512(w->value[p / TILE][d / TILE + 1][p % TILE], _mm512_unpackhi_epi16(v0, v1));
        }
    }
}

static void score(const Batch *b, Work *w, int t, const uint16_t *const *tiles) {
    int64_t stride = b->kv_heads * b->dim * 2;
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    for (int64_t d = 0; d < b->dim; d += DEPTH) {
        tile_load(7, w->query[t][d / 2], 64);
        tile_load(4, tiles[0] + d, stride);
        tile_multiply(0, 4, 7);
        tile_load(5, tiles[1] + d, stride);
        tile_multiply(1, 5, 7);
        tile_load(4, tiles[2] + d, stride);
        tile_multiply(2, 4, 7);
        tile_load(5, tiles[3] + d, stride);
        tile_multiply(3, 5, 7);
    }
    tile_store(0, w->scores[0], 64);
    tile_store(1, w->scores[16], 64);
    tile_store(2, w->scores[32], 64);
    tile_store(3, w->scores[48], 64);
}

/* Scores to probabilities against the new running maximum; rescales what was summed under the old one. */
static void softmax(const Batch *b, Work *w, int t, int64_t first_key, int is_masked) {
    __m512 factor = _mm512_set1_ps(b->scale * 1.44269504f), before = _mm512_load_ps(w->maximum[t]), largest = before;
    __m512i position = _mm512_load_si512(w->position[t]);
    __m512i oldest = _mm512_sub_epi32(position, _mm512_set1_epi32((int)b->window));
    for (int64_t j = 0; j < KEYS; j++) {
        __m512 s = _mm512_mul_ps(_mm512_load_ps(w->scores[j]), factor);
        if (is_masked) {
            __m512i key = _mm512_set1_epi32((int)(first_key + j));
            __mmask16 seen = _mm512_cmple_epi32_mask(key, position);
            if (b->window)
                seen &= _mm512_cmpgt_epi32_mask(key, oldest);
            s = _mm512_mask_blend_ps(seen, _mm512_set1_ps(-INFINITY), s);
        }
        largest = _mm512_max_ps(largest, s);
        _mm512_store_ps(w->scores[j], s);
    }
    __m512 decay = exp2_ps(_mm512_sub_ps(before, largest)), sum = _mm512_mul_ps(_mm512_load_ps(w->sum[t]), decay);
    for (int64_t half = 0; half < KEYS / DEPTH; half++) {
        __m512i rows[TILE];
        for (int64_t r = 0; r < TILE; r++) {
            int64_t j = half * DEPTH + 2 * r;
            __m512 p0 = exp2_ps(_mm512_sub_ps(_mm512_load_ps(w->scores[j]), largest));
            __m512 p1 = exp2_ps(_mm512_sub_ps(_mm512_load_ps(w->scores[j + 1]), largest));
            sum = _mm512_add_ps(sum, _mm512_add_ps(p0, p1));
            rows[r] = _mm512_or_si512(bf16_bits(p0), _mm512_slli_epi32(bf16_bits(p1), 16));
        }
        transpose(rows);
        for (int64_t r = 0; r < TILE; r++)
            _mm512_store_si512(w->pairs[half][r], rows[r]);
    }
    _mm512_store_ps(w->sum[t], sum);
    _mm512_store_ps(w->maximum[t], largest);
    if (_mm512_cmpneq_ps_mask(before, largest)) {
        float decays[TILE] __attribute__((aligned(64)));
        _mm512_store_ps(decays, decay);
        for (int64_t d = 0; d < b->dim / TILE; d++)
            for (int64_t r = 0; r < TILE; r++) {
                float *out = w->out[t][d] + r * TILE;
                _mm512_store_ps(out, _mm512_mul_ps(_mm512_load_ps(out), _mm512_set1_ps(decays[r])));
            }
    }
}

static void accumulate(const Batch *b, Work *w, int t) {
    tile_load(4, w->pairs[0], 64);
    tile_load(5, w->pairs[1], 64);
    for (int64_t d = 0; d < b->dim / TILE; d++) {
        tile_load(0, w->out[t][d], 64);
        tile_load(6, w->value[0][d], 64);
        tile_multiply(0, 4, 6);
        tile_load(7, w->value[1][d], 64);
        tile_multiply(0, 5, 7);
        tile_store(0, w->out[t][d], 64);
    }
}

/* Unpacking put dims 0-3, 8-11, 16-19, 24-27 of 32 into the first tile and the others into the second. */
static void store_rows(const Batch *b, const Work *w, int64_t row, int64_t head, int64_t first_row, int64_t num_rows) {
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    int64_t group = b->heads / b->kv_heads;
    for (int64_t i = 0; i < num_rows; i++) {
        int64_t token = b->query_starts[row] + (first_row + i) / group, of_group = (first_row + i) % group;
        uint16_t *out = b->out + (token * b->heads + head * group + of_group) * b->dim;
        __m512 share = _mm512_set1_ps(1.0f / w->sum[i / TILE][i % TILE]);
        for (int64_t d = 0; d < b->dim / TILE; d += 2) {
            const float *first = w->out[i / TILE][d] + i % TILE * TILE;
            __m512 x = _mm512_mul_ps(_mm512_load_ps(first), share);
            __m512 y = _mm512_mul_ps(_mm512_load_ps(first + TILE_FLOATS), share);
            __m512 front = _mm512_permutex2var_ps(x, low, y), back = _mm512_permutex2var_ps(x, high, y);
            _mm512_storeu_si512(out + d * TILE, (__m512i)_mm512_cvtne2ps_pbh(back, front));
        }
    }
}

static void run_task(const Batch *b, Work *w, int64_t row, int64_t head, int64_t first_row) {
    int64_t group = b->heads / b->kv_heads;
    int64_t left = (b->query_starts[row + 1] - b->query_starts[row]) * group - first_row;
    int64_t num_rows = left < ROW_TILES * TILE ? left : ROW_TILES * TILE;
    int num_tiles = load_queries(b, w, row, head, first_row, num_rows);
    int64_t first = b->positions[row] + first_row / group, last = b->positions[row] + (first_row + num_rows - 1) / group;
    int64_t start = b->window && first >= b->window ? (first - b->window + 1) / KEYS * KEYS : 0;
    for (int64_t key = start; key <= last; key += KEYS) {
        const uint16_t *tiles[KEYS / TILE];
        for (int64_t i = 0; i < KEYS / TILE; i++)
            tiles[i] = key_tile(b, row, head, key + i * TILE <= last ? key + i * TILE : key);
        prefetch(b, row, head, key + KEYS, last);
        load_values(b, w, tiles, last + 1 - key);
        int is_masked = key + KEYS - 1 > first || (b->window && key <= last - b->window);
        for (int t = 0; t < num_tiles; t++) {
            score(b, w, t, tiles);
            softmax(b, w, t, key, is_masked);
            accumulate(b, w, t);
        }
    }
    store_rows(b, w, row, head, first_row, num_rows);
}

int attend(const uint16_t *query, const uint16_t *kv, uint16_t *out, const int64_t *query_starts,
            const int64_t *positions, const int64_t *block_table, int64_t query_stride, int64_t block_stride,
            int64_t value_offset, int64_t table_width, int64_t rows, int64_t heads, int64_t kv_heads, int64_t dim,
            int64_t block_size, int64_t window, float scale, int threads) {
    const Batch batch = {query,        kv,          out,  query_starts, positions, block_table, query_stride, block_stride,
                         value_offset, table_width, rows, heads,        kv_heads,  dim,         block_size,   window,
                         scale};
    int64_t longest = 0, per_task = ROW_TILES * TILE;
    for (int64_t row = 0; row < rows; row++) {
        int64_t num = (query_starts[row + 1] - query_starts[row]) * (heads / kv_heads);
        longest = num > longest ? num : longest;
    }
    int64_t parts = (longest + per_task - 1) / per_task;
#pragma omp parallel num_threads(threads)
    {
        Work work;
        TileConfig before;
        tiles_begin(&before);
        /* Later parts see more keys: largest first, so that threads end together. */
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t part = parts - 1; part >= 0; part--)
            for (int64_t row = 0; row < rows; row++)
                for (int64_t head = 0; head < kv_heads; head++)
                    if (part * per_task < (query_starts[row + 1] - query_starts[row]) * (heads / kv_heads))
                        run_task(&batch, &work, row, head, part * per_task);
        tiles_end(&before);
    }
    return 0;
}
