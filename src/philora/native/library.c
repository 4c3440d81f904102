/* The element-wise work of a training step on a CPU, one pass over memory each; native.py compiles and calls it.

   Elements are bf16 or fp32 (`wide` says fp32), everything in between is fp32, results are rounded to nearest even.
   Each function has its plain form in PyTorch, named in native.py. Rows are shared out over `threads`, and no result
   depends on how many there are. */

#ifdef __clang__
#error "clang brings an OpenMP of its own, whose threads would compete with those of PyTorch"
#endif

#include <math.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float from_bits(uint32_t bits) {
    union { uint32_t u; float f; } both = {.u = bits};
    return both.f;
}

INLINE uint32_t to_bits(float value) {
    union { float f; uint32_t u; } both = {.f = value};
    return both.u;
}

INLINE float load(const void *at, size_t i, int wide) {
    return wide ? ((const float *)at)[i] : from_bits((uint32_t)((const uint16_t *)at)[i] << 16);
}

INLINE uint16_t rounded(float value) {
    uint32_t bits = to_bits(value);
    uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest; /* NaN stays NaN */
}

INLINE void store(void *at, size_t i, float value, int wide) {
    if (wide)
        ((float *)at)[i] = value;
    else
        ((uint16_t *)at)[i] = rounded(value);
}

INLINE void *row_of(const void *at, size_t offset, int wide) { return (char *)at + offset * (wide ? 4 : 2); }

/* exp(x) for x <= 88, relative error below 2e-7, 0 below -87: 2^n times a polynomial of |r| <= ln(2) / 2. */
INLINE float exponential(float x) {
    float bounded = x < -87.0f ? -87.0f : x;
    float n = rintf(bounded * 1.44269504f);
    float r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    p *= from_bits((uint32_t)((int32_t)n + 127) << 23);
    return x < -87.0f ? 0.0f : p;
}

INLINE float sigmoid(float x) {
    float e = exponential(-fabsf(x));
    return (x < 0 ? e : 1.0f) / (1.0f + e);
}

/* ---------------------------------------------------------------------------------------------------- RMSNorm */

INLINE void norm_row(const void *x, const void *weight, void *y, float *inverse, size_t columns, float eps, int wide) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t c = 0; c < columns; c++) {
        float v = load(x, c, wide);
        sum += v * v;
    }
    float scale = 1.0f / sqrtf(sum / (float)columns + eps);
    *inverse = scale;
#pragma omp simd
    for (size_t c = 0; c < columns; c++) {
        float normal = load(x, c, wide) * scale;
        if (!wide) normal = from_bits((uint32_t)rounded(normal) << 16);
        store(y, c, normal * load(weight, c, wide), wide);
    }
}

void rms_norm(const void *x, const void *weight, void *y, float *inverse, size_t rows, size_t columns, float eps,
              int wide, int threads) {
#pragma omp parallel for num_threads(threads)
    for (size_t i = 0; i < rows; i++) {
        const void *from = row_of(x, i * columns, wide);
        void *to = row_of(y, i * columns, wide);
        if (wide)
            norm_row(from, weight, to, inverse + i, columns, eps, 1);
        else
            norm_row(from, weight, to, inverse + i, columns, eps, 0);
    }
}

INLINE void norm_row_backward(const void *x, const void *weight, const void *dy, void *dx, float inverse,
                              size_t columns, int wide) {
    float along = 0;
#pragma omp simd reduction(+ : along)
    for (size_t c = 0; c < columns; c++) along += load(dy, c, wide) * load(weight, c, wide) * load(x, c, wide);
    along *= inverse * inverse / (float)columns;
#pragma omp simd
    for (size_t c = 0; c < columns; c++) {
        float grad = load(dy, c, wide) * load(weight, c, wide);
        store(dx, c, (grad - along * load(x, c, wide)) * inverse, wide);
    }
}

void rms_norm_backward(const void *x, const void *weight, const float *inverse, const void *dy, void *dx, size_t rows,
                       size_t columns, int wide, int threads) {
#pragma omp parallel for num_threads(threads)
    for (size_t i = 0; i < rows; i++) {
        const void *from = row_of(x, i * columns, wide), *grad = row_of(dy, i * columns, wide);
        void *to = row_of(dx, i * columns, wide);
        if (wide)
            norm_row_backward(from, weight, grad, to, inverse[i], columns, 1);
        else
            norm_row_backward(from, weight, grad, to, inverse[i], columns, 0);
    }
}

/* ----------------------------------------------------------------------------------------------------- SwiGLU */

INLINE void gate_row(const void *gate, const void *up, void *y, size_t columns, int wide) {
#pragma omp simd
    for (size_t c = 0; c < columns; c++) {
        float g = load(gate, c, wide);
        store(y, c, g * sigmoid(g) * load(up, c, wide), wide);
    }
}

/* gate_up is (rows, 2 columns), y (rows, columns). */
void swiglu(const void *gate_up, void *y, size_t rows, size_t columns, int wide, int threads) {
#pragma omp parallel for num_threads(threads)
    for (size_t i = 0; i < rows; i++) {
        const void *gate = row_of(gate_up, 2 * i * columns, wide), *up = row_of(gate, columns, wide);
        void *to = row_of(y, i * columns, wide);
        if (wide)
            gate_row(gate, up, to, columns, 1);
        else
            gate_row(gate, up, to, columns, 0);
    }
}

INLINE void gate_row_backward(const void *gate, const void *up, const void *dy, void *d_gate, void *d_up,
                              size_t columns, int wide) {
#pragma omp simd
    for (size_t c = 0; c < columns; c++) {
        float g = load(gate, c, wide), grad = load(dy, c, wide), s = sigmoid(g);
        store(d_up, c, grad * g * s, wide);
        store(d_gate, c, grad * load(up, c, wide) * s * (1.0f + g * (1.0f - s)), wide);
    }
}

void swiglu_backward(const void *gate_up, const void *dy, void *d_gate_up, size_t rows, size_t columns, int wide,
                     int threads) {
#pragma omp parallel for num_threads(threads)
    for (size_t i = 0; i < rows; i++) {
        const void *gate = row_of(gate_up, 2 * i * columns, wide), *up = row_of(gate, columns, wide);
        const void *grad = row_of(dy, i * columns, wide);
        void *d_gate = row_of(d_gate_up, 2 * i * columns, wide), *d_up = row_of(d_gate, columns, wide);
        if (wide)
            gate_row_backward(gate, up, grad, d_gate, d_up, columns, 1);
        else
            gate_row_backward(gate, up, grad, d_gate, d_up, columns, 0);
    }
}

/* ---------------------------------------------------------------------------------------------------- dropout */

#define LANES 16
#define ROUNDS 7

/* Philox4x32 with ROUNDS rounds of LANES counters at a time (Salmon et al., "Parallel random numbers: as easy as 1, 2,
   3", 2011: seven rounds pass all of BigCrush, ten leave a margin). */
INLINE void philox(uint32_t c[4][LANES], uint32_t k0, uint32_t k1) {
    for (int round = 0; round < ROUNDS; round++) {
#pragma omp simd
        for (int l = 0; l < LANES; l++) {
            uint64_t first = (uint64_t)0xD2511F53u * c[0][l], second = (uint64_t)0xCD9E8D57u * c[2][l];
            c[0][l] = (uint32_t)(second >> 32) ^ c[1][l] ^ k0;
            c[1][l] = (uint32_t)second;
            c[2][l] = (uint32_t)(first >> 32) ^ c[3][l] ^ k1;
            c[3][l] = (uint32_t)first;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
}

/* Bits that are 1 where 16 random bits are at least `dropped`. Eight words of 16 bits come from LANES counters; the
   random half h of lane l decides bit h of byte l (and words have their low byte first). */
void keep_bits(uint64_t seed, uint64_t dropped, uint16_t *words, size_t count, int threads) {
    uint32_t least = (uint32_t)dropped;
#pragma omp parallel for num_threads(threads)
    for (size_t block = 0; block < (count + 7) / 8; block++) {
        uint32_t c[4][LANES], bits[LANES] = {0};
        uint8_t bytes[LANES];
        for (int l = 0; l < LANES; l++) {
            uint64_t counter = block * LANES + l;
            c[0][l] = (uint32_t)counter;
            c[1][l] = (uint32_t)(counter >> 32);
            c[2][l] = c[3][l] = 0;
        }
        philox(c, (uint32_t)seed, (uint32_t)(seed >> 32));
        for (int w = 0; w < 4; w++)
#pragma omp simd
            for (int l = 0; l < LANES; l++) {
                bits[l] |= (uint32_t)((c[w][l] & 0xffff) >= least) << 2 * w;
                bits[l] |= (uint32_t)((c[w][l] >> 16) >= least) << (2 * w + 1);
            }
        for (int l = 0; l < LANES; l++) bytes[l] = (uint8_t)bits[l];
        size_t left = count - block * 8;
        memcpy(words + block * 8, bytes, left < 8 ? left * 2 : LANES);
    }
}

/* y = x where the bit is 1, else 0. A row of x has (columns + 15) / 16 words. */
void keep(const void *x, const uint16_t *words, void *y, size_t rows, size_t columns, int wide, int threads) {
    size_t per_row = (columns + 15) / 16;
#pragma omp parallel for num_threads(threads)
    for (size_t i = 0; i < rows; i++) {
        for (size_t w = 0; w < per_row; w++) {
            uint32_t word = words[i * per_row + w];
            size_t first = i * columns + 16 * w, n = columns - 16 * w < 16 ? columns - 16 * w : 16;
            if (wide) {
                const uint32_t *from = (const uint32_t *)x + first;
                uint32_t *to = (uint32_t *)y + first;
                for (size_t l = 0; l < n; l++) to[l] = from[l] & -((word >> l) & 1);
            } else {
                const uint16_t *from = (const uint16_t *)x + first;
                uint16_t *to = (uint16_t *)y + first;
                for (size_t l = 0; l < n; l++) to[l] = from[l] & -((word >> l) & 1);
            }
        }
    }
}

/* y += x where the bit is 1. */
void add_kept(const void *x, const uint16_t *words, void *y, size_t rows, size_t columns, int wide, int threads) {
    size_t per_row = (columns + 15) / 16;
#pragma omp parallel for num_threads(threads)
    for (size_t i = 0; i < rows; i++) {
        for (size_t w = 0; w < per_row; w++) {
            uint32_t word = words[i * per_row + w];
            size_t first = i * columns + 16 * w, n = columns - 16 * w < 16 ? columns - 16 * w : 16;
            for (size_t l = 0; l < n; l++) {
                size_t at = first + l;
                if (wide) {
                    float value = from_bits(((const uint32_t *)x)[at] & -((word >> l) & 1));
                    ((float *)y)[at] += value;
                } else {
                    float value = from_bits((uint32_t)(((const uint16_t *)x)[at] & -((word >> l) & 1)) << 16);
                    store(y, at, load(y, at, 0) + value, 0);
                }
            }
        }
    }
}

/* -------------------------------------------------------------------------------------------------- attention */

/* (a, b) becomes (a cos - b sin, b cos + a sin); `sign` -1 turns it back. Other columns are copied. */
INLINE void turned(const float *row, const float *cos, const float *sin, float sign, size_t half, size_t width,
                   float *out) {
#pragma omp simd
    for (size_t c = 0; c < half; c++) {
        float a = row[c], b = row[c + half], x = cos[c], y = sign * sin[c];
        out[c] = a * x - b * y;
        out[c + half] = b * x + a * y;
    }
    for (size_t c = 2 * half; c < width; c++) out[c] = row[c];
}

/* Heads of some documents, rotated where `half` is not 0, each as often as `repeat` says, padding zero.
   from (tokens, stride) has the head h of a token at column h * width; to is (heads * repeat, documents, length, width). */
void gather_heads(const void *from, size_t stride, size_t heads, size_t repeat, size_t width, const int64_t *starts,
                  const int64_t *lengths, size_t documents, size_t length, const float *cos, const float *sin,
                  size_t half, float *to, int wide, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads)
    for (size_t h = 0; h < heads; h++) {
        for (size_t d = 0; d < documents; d++) {
            float row[width];
            size_t own = (size_t)lengths[d];
            float *first = to + (h * repeat * documents + d) * length * width;
            for (size_t t = 0; t < own; t++) {
                size_t token = (size_t)starts[d] + t;
                const void *source = row_of(from, token * stride + h * width, wide);
                float *target = first + t * width;
                float *plain = half ? row : target;
                if (wide)
                    memcpy(plain, source, width * 4);
                else
                    for (size_t c = 0; c < width; c++) plain[c] = load(source, c, 0);
                if (half) turned(row, cos + token * half, sin + token * half, 1.0f, half, width, target);
            }
            memset(first + own * width, 0, (length - own) * width * 4);
            for (size_t again = 1; again < repeat; again++)
                memcpy(first + again * documents * length * width, first, length * width * 4);
        }
    }
}

/* The way back: rows of `repeat` heads are added up, turned back, rounded and put at their tokens. */
void scatter_heads(const float *from, size_t heads, size_t repeat, size_t width, const int64_t *starts,
                   const int64_t *lengths, size_t documents, size_t length, const float *cos, const float *sin,
                   size_t half, void *to, size_t stride, int wide, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads)
    for (size_t h = 0; h < heads; h++) {
        for (size_t d = 0; d < documents; d++) {
            float sum[width], back[width];
            const float *first = from + (h * repeat * documents + d) * length * width;
            for (size_t t = 0; t < (size_t)lengths[d]; t++) {
                size_t token = (size_t)starts[d] + t;
                const float *row = first + t * width;
                if (repeat > 1) {
                    for (size_t c = 0; c < width; c++) sum[c] = row[c];
                    for (size_t again = 1; again < repeat; again++) {
                        const float *other = row + again * documents * length * width;
                        for (size_t c = 0; c < width; c++) sum[c] += other[c];
                    }
                    row = sum;
                }
                void *target = row_of(to, token * stride + h * width, wide);
                if (half) {
                    turned(row, cos + token * half, sin + token * half, -1.0f, half, width, back);
                    row = back;
                }
                if (wide)
                    memcpy(target, row, width * 4);
                else
                    for (size_t c = 0; c < width; c++) store(target, c, row[c], 0);
            }
        }
    }
}

/* Columns of a row of scores that its query sees: from `low` to before `high`. The query of row r is `offset` + r
   columns from the first key. */
INLINE void seen(size_t r, size_t offset, size_t window, size_t keys, size_t *low, size_t *high) {
    size_t own = offset + r + 1;
    *high = own < keys ? own : keys;
    *low = window && own > window ? own - window : 0;
}

/* Softmax of scale * scores over the columns that each query sees, in place; 0 elsewhere. scores (batch, rows, keys). */
void causal_softmax(float *scores, size_t batch, size_t rows, size_t keys, size_t offset, size_t window, float scale,
                    int threads) {
#pragma omp parallel for num_threads(threads)
    for (size_t i = 0; i < batch * rows; i++) {
        float *row = scores + i * keys;
        size_t low, high;
        seen(i % rows, offset, window, keys, &low, &high);
        float largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
        for (size_t c = low; c < high; c++) largest = row[c] > largest ? row[c] : largest;
#pragma omp simd reduction(+ : sum)
        for (size_t c = low; c < high; c++) {
            float e = exponential((row[c] - largest) * scale);
            row[c] = e;
            sum += e;
        }
        float factor = 1.0f / sum;
        for (size_t c = low; c < high; c++) row[c] *= factor;
        memset(row, 0, low * 4);
        memset(row + high, 0, (keys - high) * 4);
    }
}

/* d_scores = scale * weights * (d_weights - sum(weights * d_weights)), over d_weights. */
void causal_softmax_backward(const float *weights, float *d_weights, size_t batch, size_t rows, size_t keys,
                             size_t offset, size_t window, float scale, int threads) {
#pragma omp parallel for num_threads(threads)
    for (size_t i = 0; i < batch * rows; i++) {
        const float *row = weights + i * keys;
        float *grad = d_weights + i * keys;
        size_t low, high;
        seen(i % rows, offset, window, keys, &low, &high);
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (size_t c = low; c < high; c++) sum += row[c] * grad[c];
        for (size_t c = low; c < high; c++) grad[c] = scale * row[c] * (grad[c] - sum);
        memset(grad, 0, low * 4);
        memset(grad + high, 0, (keys - high) * 4);
    }
}

/* ------------------------------------------------------------------------------------- attention in one piece */

/* Each thread takes a head of a document from the projections' output to the heads' output, in blocks of SIDE queries
   and SIDE keys that stay in its cache, with the small products of PyTorch's oneDNN in between.

   `product` is C (m, n) = A (m, k) B (k, n), added to C where `add`; A row by row, B with pairs of its rows
   interleaved ("vnni": (k / 2, n, 2)); `lda`, `ldb`, `ldc` elements from row to row. */
typedef void (*product_t)(int64_t m, int64_t n, int64_t k, int64_t lda, int64_t ldb, int64_t ldc, bool add,
                          const uint16_t *a, const uint16_t *b, float *c, bool is_vnni);
typedef void (*release_t)(bool is_vnni);

#define SIDE 64
#define BLOCK (SIDE * SIDE)
#define MOST_WIDTH 256

typedef struct {
    const uint16_t *query, *key, *value;                /* of the first token and head */
    size_t query_stride, key_stride, value_stride;      /* elements from token to token */
    size_t heads, key_heads, width;
    const int64_t *starts, *lengths;                    /* of the documents */
    size_t documents;
    const float *cos, *sin;                             /* (tokens, half) */
    size_t half, window, tokens;
    float scale;
    product_t product;
    release_t release;
} Attention;

INLINE size_t blocks_of(size_t length) { return (length + SIDE - 1) / SIDE; }

/* The first block of keys that a block of queries sees. */
INLINE size_t first_block(size_t i, size_t window) {
    return window && i * SIDE + 1 > window ? (i * SIDE + 1 - window) / SIDE : 0;
}

/* Rows of one head stand far apart, where the processor does not foresee the next: it is told this many before. */
#define AHEAD 8

INLINE void near(const uint16_t *row, size_t width) {
    for (size_t c = 0; c < width; c += 32) __builtin_prefetch(row + c);
}

/* SIDE rows of bf16 from a document's tokens, rotated where cos is given, zero after its end. */
static void rows_of(const Attention *a, const uint16_t *from, size_t stride, size_t document, size_t block, bool turn,
                    uint16_t *rows) {
    size_t length = (size_t)a->lengths[document], width = a->width;
    for (size_t r = 0; r < SIDE; r++) {
        size_t t = block * SIDE + r;
        uint16_t *to = rows + r * width;
        if (t >= length) {
            memset(to, 0, width * 2);
            continue;
        }
        size_t token = (size_t)a->starts[document] + t;
        const uint16_t *source = from + token * stride;
        near(source + AHEAD * stride, width);
        if (turn) {
            float row[MOST_WIDTH], turned_row[MOST_WIDTH];
            for (size_t c = 0; c < width; c++) row[c] = load(source, c, 0);
            turned(row, a->cos + token * a->half, a->sin + token * a->half, 1.0f, a->half, width, turned_row);
            for (size_t c = 0; c < width; c++) store(to, c, turned_row[c], 0);
        } else {
            memcpy(to, source, width * 2);
        }
    }
}

/* Interleaved rows of the transpose: (SIDE, width) becomes (width / 2, SIDE, 2). */
static void pack_transposed(const uint16_t *rows, size_t width, uint16_t *packed) {
    for (size_t r = 0; r < SIDE; r++)
        for (size_t c = 0; c < width / 2; c++)
            memcpy(packed + (c * SIDE + r) * 2, rows + r * width + 2 * c, 4);
}

/* Interleaved rows: (SIDE, width) becomes (SIDE / 2, width, 2). */
static void pack_rows(const uint16_t *rows, size_t width, uint16_t *packed) {
    for (size_t r = 0; r < SIDE; r += 2) {
        const uint16_t *even = rows + r * width, *odd = even + width;
        uint32_t *to = (uint32_t *)(packed + r * width);
        for (size_t c = 0; c < width; c++) to[c] = even[c] | (uint32_t)odd[c] << 16;
    }
}

static void transpose(const uint16_t *rows, size_t width, uint16_t *columns) {
    for (size_t r = 0; r < SIDE; r++)
        for (size_t c = 0; c < width; c++) columns[c * SIDE + r] = rows[r * width + c];
}

static void attend_head(const Attention *a, size_t document, size_t head, uint16_t *output, float *normaliser,
                        char *room) {
    size_t length = (size_t)a->lengths[document], width = a->width, blocks = blocks_of(length), part = SIDE * width;
    size_t key_head = head / (a->heads / a->key_heads);
    float *scores = (float *)room, *sums = scores + blocks * BLOCK;
    uint16_t *weights = (uint16_t *)(sums + part), *keys = weights + blocks * BLOCK, *values = keys + blocks * part;
    uint16_t *query = values + blocks * part;
    for (size_t j = 0; j < blocks; j++) {
        rows_of(a, a->key + key_head * width, a->key_stride, document, j, a->half > 0, query);
        pack_transposed(query, width, keys + j * part);
        rows_of(a, a->value + key_head * width, a->value_stride, document, j, false, query);
        pack_rows(query, width, values + j * part);
    }
    for (size_t i = 0; i < blocks; i++) {
        size_t first = first_block(i, a->window);
        float factors[SIDE] = {0};
        rows_of(a, a->query + head * width, a->query_stride, document, i, a->half > 0, query);
        for (size_t j = first; j <= i; j++)
            a->product(SIDE, SIDE, width, width, SIDE, SIDE, false, query, keys + j * part, scores + j * BLOCK, true);
        for (size_t r = 0; r < SIDE; r++) {
            size_t t = i * SIDE + r, low = a->window && t + 1 > a->window ? t + 1 - a->window : 0;
            size_t end = t < length ? t + 1 : 0;
            float largest = -INFINITY, sum = 0;
            for (size_t j = first; j <= i; j++) {
                const float *row = scores + j * BLOCK + r * SIDE;
                size_t from = low > j * SIDE ? low - j * SIDE : 0, to = end < (j + 1) * SIDE ? end - j * SIDE : SIDE;
                if (end <= j * SIDE) break;
#pragma omp simd reduction(max : largest)
                for (size_t c = from; c < to; c++) largest = row[c] > largest ? row[c] : largest;
            }
            for (size_t j = first; j <= i; j++) {
                const float *row = scores + j * BLOCK + r * SIDE;
                uint16_t *out = weights + j * BLOCK + r * SIDE;
                size_t from = low > j * SIDE ? low - j * SIDE : 0;
                size_t to = end <= j * SIDE ? 0 : end < (j + 1) * SIDE ? end - j * SIDE : SIDE;
                if (from || to < SIDE) memset(out, 0, SIDE * 2);
#pragma omp simd reduction(+ : sum)
                for (size_t c = from; c < to; c++) {
                    float e = exponential((row[c] - largest) * a->scale);
                    sum += e;
                    store(out, c, e, 0);
                }
            }
            if (end) {
                factors[r] = 1.0f / sum;
                normaliser[head * a->tokens + (size_t)a->starts[document] + t] = largest * a->scale + logf(sum);
            }
        }
        for (size_t j = first; j <= i; j++)
            a->product(SIDE, width, SIDE, SIDE, width, width, j > first, weights + j * BLOCK, values + j * part, sums,
                       true);
        for (size_t r = 0; r < SIDE && i * SIDE + r < length; r++) {
            size_t token = (size_t)a->starts[document] + i * SIDE + r;
            uint16_t *to = output + (token * a->heads + head) * width;
            for (size_t c = 0; c < width; c++) store(to, c, sums[r * width + c] * factors[r], 0);
        }
    }
}

/* One row back to its token, turned back where cos is given. */
static void row_to(const Attention *a, size_t token, bool turn, const float *row, uint16_t *to, size_t stride) {
    float back[MOST_WIDTH];
    near(to + AHEAD * stride, a->width);
    if (turn) {
        turned(row, a->cos + token * a->half, a->sin + token * a->half, -1.0f, a->half, a->width, back);
        row = back;
    }
    for (size_t c = 0; c < a->width; c++) store(to, c, row[c], 0);
}

/* Weights and their gradients of a block, keys by queries: bf16 P^T and dS^T, and dS^T with its rows interleaved. */
INLINE void block_gradient(const float *scores, const float *grads, const float *normaliser, const float *delta,
                           float scale, int32_t ahead, int32_t window, uint16_t *weights, uint16_t *d_scores,
                           uint16_t *packed, bool masked) {
    for (int32_t c = 0; c < SIDE; c++) {
        const float *score = scores + c * SIDE, *grad = grads + c * SIDE;
#pragma omp simd
        for (int32_t r = 0; r < SIDE; r++) {
            float p = exponential(score[r] * scale - normaliser[r]);
            if (masked) {
                int32_t distance = ahead + r - c; /* of the query behind the key */
                p = distance < 0 || distance >= window ? 0.0f : p;
            }
            uint16_t d = rounded(scale * p * (grad[r] - delta[r]));
            weights[c * SIDE + r] = rounded(p);
            d_scores[c * SIDE + r] = d;
        }
    }
    pack_rows(d_scores, SIDE, packed);
}

static void attend_head_backward(const Attention *a, size_t document, size_t key_head, const uint16_t *output,
                                 const uint16_t *grad, const float *normaliser, uint16_t *d_query, uint16_t *d_key,
                                 uint16_t *d_value, char *room) {
    size_t length = (size_t)a->lengths[document], width = a->width, blocks = blocks_of(length), part = SIDE * width;
    size_t repeat = a->heads / a->key_heads, start = (size_t)a->starts[document];
    float *key_sums = (float *)room, *value_sums = key_sums + blocks * part, *query_sums = value_sums + blocks * part;
    float *scores = query_sums + part, *grads = scores + BLOCK;
    uint16_t *keys = (uint16_t *)(grads + BLOCK), *key_columns = keys + blocks * part;
    uint16_t *values = key_columns + blocks * part, *rows = values + blocks * part, *query_columns = rows + part;
    uint16_t *query_rows = query_columns + part, *grad_columns = query_rows + part, *grad_rows = grad_columns + part;
    uint16_t *weights = grad_rows + part, *d_scores = weights + BLOCK, *packed = d_scores + BLOCK;
    memset(key_sums, 0, 2 * blocks * part * sizeof(float));
    for (size_t j = 0; j < blocks; j++) {
        rows_of(a, a->key + key_head * width, a->key_stride, document, j, a->half > 0, keys + j * part);
        transpose(keys + j * part, width, key_columns + j * part);
        rows_of(a, a->value + key_head * width, a->value_stride, document, j, false, values + j * part);
    }
    for (size_t head = key_head * repeat; head < (key_head + 1) * repeat; head++) {
        for (size_t i = 0; i < blocks; i++) {
            float norms[SIDE], delta[SIDE], row[MOST_WIDTH];
            size_t first = first_block(i, a->window);
            rows_of(a, a->query + head * width, a->query_stride, document, i, a->half > 0, rows);
            pack_transposed(rows, width, query_columns);
            pack_rows(rows, width, query_rows);
            rows_of(a, grad + head * width, a->heads * width, document, i, false, rows);
            pack_transposed(rows, width, grad_columns);
            pack_rows(rows, width, grad_rows);
            for (size_t r = 0; r < SIDE; r++) {
                size_t token = start + i * SIDE + r;
                float sum = 0;
                norms[r] = INFINITY;
                if (i * SIDE + r < length) {
                    const uint16_t *own = output + (token * a->heads + head) * width;
#pragma omp simd reduction(+ : sum)
                    for (size_t c = 0; c < width; c++) sum += load(own, c, 0) * load(rows, r * width + c, 0);
                    norms[r] = normaliser[head * a->tokens + token];
                }
                delta[r] = sum;
            }
            for (size_t j = first; j <= i; j++) {
                int32_t ahead = (int32_t)((i - j) * SIDE);
                int32_t window = a->window && a->window < INT32_MAX / 2 ? (int32_t)a->window : INT32_MAX / 2;
                a->product(SIDE, SIDE, width, width, SIDE, SIDE, false, keys + j * part, query_columns, scores, true);
                a->product(SIDE, SIDE, width, width, SIDE, SIDE, false, values + j * part, grad_columns, grads, true);
                if (i == j || ahead + SIDE > window)
                    block_gradient(scores, grads, norms, delta, a->scale, ahead, window, weights, d_scores, packed, true);
                else
                    block_gradient(scores, grads, norms, delta, a->scale, 0, 0, weights, d_scores, packed, false);
                a->product(SIDE, width, SIDE, SIDE, width, width, true, weights, grad_rows, value_sums + j * part, true);
                a->product(SIDE, width, SIDE, SIDE, width, width, true, d_scores, query_rows, key_sums + j * part, true);
                a->product(width, SIDE, SIDE, SIDE, SIDE, SIDE, j > first, key_columns + j * part, packed, query_sums,
                           true);
            }
            for (size_t r = 0; r < SIDE && i * SIDE + r < length; r++) {
                size_t token = start + i * SIDE + r;
                for (size_t c = 0; c < width; c++) row[c] = query_sums[c * SIDE + r];
                row_to(a, token, a->half > 0, row, d_query + token * a->query_stride + head * width, a->query_stride);
            }
        }
    }
    for (size_t t = 0; t < length; t++) {
        uint16_t *key = d_key + (start + t) * a->key_stride + key_head * width;
        row_to(a, start + t, a->half > 0, key_sums + t * width, key, a->key_stride);
        uint16_t *value = d_value + (start + t) * a->value_stride + key_head * width;
        row_to(a, start + t, false, value_sums + t * width, value, a->value_stride);
    }
}

static size_t longest_of(const Attention *a) {
    size_t longest = 0;
    for (size_t d = 0; d < a->documents; d++) longest = a->lengths[d] > (int64_t)longest ? (size_t)a->lengths[d] : longest;
    return longest;
}

/* output (tokens, heads, width); normaliser (heads, tokens): log of the sum of the exponentials of each query's scores.
   Returns 0, or 1 where there was no memory. */
int attend(const Attention *a, uint16_t *output, float *normaliser, int threads) {
    size_t blocks = blocks_of(longest_of(a)), part = SIDE * a->width;
    size_t size = blocks * (BLOCK * 6 + part * 4) + part * 6;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        char *room = aligned_alloc(64, (size + 63) / 64 * 64);
        failed = room == NULL;
#pragma omp for schedule(dynamic)
        for (size_t item = 0; item < a->documents * a->heads; item++)
            if (!failed) attend_head(a, item / a->heads, item % a->heads, output, normaliser, room);
        a->release(true);
        free(room);
    }
    return failed;
}

/* Gradients of query, key and value, laid out as these are, from `grad` (tokens, heads, width), that of the output. */
int attend_backward(const Attention *a, const uint16_t *output, const uint16_t *grad, const float *normaliser,
                    uint16_t *d_query, uint16_t *d_key, uint16_t *d_value, int threads) {
    size_t blocks = blocks_of(longest_of(a)), part = SIDE * a->width;
    size_t size = blocks * part * 14 + part * 14 + BLOCK * 14;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        char *room = aligned_alloc(64, (size + 63) / 64 * 64);
        failed = room == NULL;
#pragma omp for schedule(dynamic)
        for (size_t item = 0; item < a->documents * a->key_heads; item++)
            if (!failed)
                attend_head_backward(a, item / a->key_heads, item % a->key_heads, output, grad, normaliser, d_query,
                                     d_key, d_value, room);
        a->release(true);
        free(room);
    }
    return failed;
}

/* Whether `product` multiplies as Attention expects, with and without `add`. */
int products_work(product_t product, release_t release) {
    static uint16_t a[SIDE * 32], b[32 * SIDE];
    static float c[BLOCK], expected[BLOCK];
    float plain[32 * SIDE];
    for (size_t i = 0; i < SIDE * 32; i++) {
        store(a, i, (float)((int)(i * 7 % 11) - 5), 0);
        plain[i] = (float)((int)(i * 5 % 13) - 6);
    }
    for (size_t k = 0; k < 32; k++)
        for (size_t n = 0; n < SIDE; n++) store(b, (k / 2 * SIDE + n) * 2 + k % 2, plain[k * SIDE + n], 0);
    for (size_t m = 0; m < SIDE; m++)
        for (size_t n = 0; n < SIDE; n++)
            for (size_t k = 0; k < 32; k++) expected[m * SIDE + n] += 2 * load(a, m * 32 + k, 0) * plain[k * SIDE + n];
    for (int again = 0; again < 2; again++) product(SIDE, SIDE, 32, 32, SIDE, SIDE, again, a, b, c, true);
    release(true);
    return memcmp(c, expected, sizeof c) == 0;
}

/* ------------------------------------------------------------------------------------------------------- loss */

INLINE void score_row(void *logits, const float *bias, size_t label, float *log_prob, float *entropy, float *is_top1,
                      size_t vocabulary, int needs_grad, int biased, int wide) {
    float largest = -INFINITY, sum = 0, mean = 0;
#define LOGIT(c) (load(logits, c, wide) + (biased ? bias[c] : 0.0f))
#pragma omp simd reduction(max : largest)
    for (size_t c = 0; c < vocabulary; c++) {
        float x = LOGIT(c);
        largest = x > largest ? x : largest;
    }
#pragma omp simd reduction(+ : sum, mean)
    for (size_t c = 0; c < vocabulary; c++) {
        float x = LOGIT(c) - largest, e = exponential(x);
        sum += e;
        mean += e * x;
    }
    float chosen = LOGIT(label), normaliser = logf(sum), factor = -1.0f / sum;
    *log_prob = chosen - largest - normaliser;
    *entropy = normaliser - mean / sum;
    *is_top1 = chosen >= largest;
    if (!needs_grad) return;
    float own = 1.0f + exponential(chosen - largest) * factor;
#pragma omp simd
    for (size_t c = 0; c < vocabulary; c++) store(logits, c, exponential(LOGIT(c) - largest) * factor, wide);
    store(logits, label, own, wide);
#undef LOGIT
}

/* Log-probability of each row's label, entropy, whether no logit is larger; over the logits, onehot - softmax. */
void score_rows(void *logits, const float *bias, const int64_t *labels, float *log_probs, float *entropy,
                float *is_top1, size_t rows, size_t vocabulary, int needs_grad, int wide, int threads) {
#pragma omp parallel for num_threads(threads)
    for (size_t i = 0; i < rows; i++) {
        void *row = row_of(logits, i * vocabulary, wide);
        float *out[] = {log_probs + i, entropy + i, is_top1 + i};
        if (wide)
            score_row(row, bias, (size_t)labels[i], out[0], out[1], out[2], vocabulary, needs_grad, bias != NULL, 1);
        else if (bias)
            score_row(row, bias, (size_t)labels[i], out[0], out[1], out[2], vocabulary, needs_grad, 1, 0);
        else
            score_row(row, bias, (size_t)labels[i], out[0], out[1], out[2], vocabulary, needs_grad, 0, 0);
    }
}

/* --------------------------------------------------------------------------------------------- quantised weights */

/* 32 weights of 4 bits each, the first in the high half of the first byte: code[index] * scale, rounded to bf16. */
#ifdef __AVX512F__
typedef float floats __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint8_t bytes __attribute__((vector_size(16)));

INLINE words nearest(floats value) {
    words bits = (words)value;
    return bits + 0x7fff + ((bits >> 16) & 1);
}

INLINE void from_16_bytes(const uint8_t *packed, const float *code, float scale, uint16_t *weights) {
    floats table;
    bytes both;
    memcpy(&table, code, sizeof table);
    memcpy(&both, packed, sizeof both);
    words pairs = __builtin_convertvector(both, words);
    words first = nearest(__builtin_shuffle(table, pairs >> 4) * scale) >> 16;
    words second = nearest(__builtin_shuffle(table, pairs & 15) * scale) & 0xffff0000;
    words result = first | second;
    memcpy(weights, &result, sizeof result);
}
#else
INLINE void from_16_bytes(const uint8_t *packed, const float *code, float scale, uint16_t *weights) {
    for (size_t i = 0; i < 16; i++) {
        weights[2 * i] = rounded(code[packed[i] >> 4] * scale);
        weights[2 * i + 1] = rounded(code[packed[i] & 15] * scale);
    }
}
#endif

/* Blocks of `block` weights, a multiple of 32, with a scale each; all finite. */
void from_4bit(const uint8_t *packed, const float *code, const float *scales, uint16_t *weights, size_t blocks,
               size_t block, int threads) {
#pragma omp parallel for num_threads(threads)
    for (size_t i = 0; i < blocks; i++)
        for (size_t j = i * block; j < (i + 1) * block; j += 32)
            from_16_bytes(packed + j / 2, code, scales[i], weights + j);
}
