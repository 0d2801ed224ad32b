/* The CPU backend's bf16 operations, for the compiler of the machine that runs them.
 *
 * Why not torch ops alone: one decode step of a small model spends more time in their temporaries
 * (gathered KV, masks, fp32 copies) than in the matrix products. Each function here reads its
 * inputs once, computes in fp32, and rounds once.
 *
 * Legend: T tokens, B sequences, N query heads, K kv heads, G = N / K, H head size, S block size.
 */

#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

enum { MAX_GROUP = 16, MAX_HEAD = 256, LANES = 16 };

static const float LOG2_E = 1.44269504f;

/* Sixteen floats: one AVX-512 register, two of AVX2, four of NEON. */
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t int_lanes __attribute__((vector_size(4 * LANES)));
typedef uint32_t uint_lanes __attribute__((vector_size(4 * LANES)));
typedef bf16 bf16_lanes __attribute__((vector_size(2 * LANES), aligned(2)));

static inline float widen(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline bf16 narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bf16)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16); /* to nearest, ties to even */
}

static inline lanes load_lanes(const bf16 *x) {
    bf16_lanes raw = *(const bf16_lanes *)x;
    uint_lanes bits = __builtin_convertvector(raw, uint_lanes) << 16;
    return (lanes)bits;
}

static inline float sum_lanes(lanes x) {
    float total = 0.0f;
    for (int i = 0; i < LANES; i++) total += x[i];
    return total;
}

/* 2^x for x <= 0 to about 2e-7 relative; the polynomial is a Chebyshev fit of 2^f on [-0.5, 0.5]. */
static inline float exp2_approx(float x) {
    x = x < -126.0f ? -126.0f : x;
    float whole = rintf(x);
    float f = x - whole;
    float p = 1.53533484e-4f;
    p = p * f + 1.33988718e-3f;
    p = p * f + 9.61843736e-3f;
    p = p * f + 5.55033250e-2f;
    p = p * f + 2.40226479e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)whole + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return p * scale;
}

/* The same for sixteen numbers; x - 0.5 towards zero is x to the nearest for x <= 0. */
static inline lanes exp2_lanes(lanes x) {
    for (int i = 0; i < LANES; i++) x[i] = x[i] < -126.0f ? -126.0f : x[i];
    int_lanes whole = __builtin_convertvector(x - 0.5f, int_lanes);
    lanes f = x - __builtin_convertvector(whole, lanes);
    lanes p = f * 1.53533484e-4f + 1.33988718e-3f;
    p = p * f + 9.61843736e-3f;
    p = p * f + 5.55033250e-2f;
    p = p * f + 2.40226479e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    return p * (lanes)((whole + 127) << 23);
}

static inline float exp_approx(float x) {
    x = x > 88.0f ? 88.0f : x;
    return exp2_approx(x * LOG2_E);
}

/* residual += x when residual is given; out = weight * normalize(residual or x). */
void batchgen_rms_norm(const bf16 *x, bf16 *residual, const bf16 *weight, bf16 *out, int64_t rows,
                       int64_t width, float eps) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *in = x + row * width;
        if (residual) {
            bf16 *sum = residual + row * width;
            for (int64_t i = 0; i < width; i++) sum[i] = narrow(widen(sum[i]) + widen(in[i]));
            in = sum;
        }
        float squares = 0.0f;
        for (int64_t i = 0; i < width; i++) squares += widen(in[i]) * widen(in[i]);
        float scale = 1.0f / sqrtf(squares / (float)width + eps);
        bf16 *to = out + row * width;
        for (int64_t i = 0; i < width; i++)
            to[i] = narrow(widen(narrow(widen(in[i]) * scale)) * widen(weight[i]));
    }
}

/* out[T, width] = silu(gate) * up, of gate and up side by side in gate_up[T, 2 * width]. */
void batchgen_silu_mul(const bf16 *gate_up, bf16 *out, int64_t rows, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        const bf16 *gate = gate_up + 2 * row * width, *up = gate + width;
        bf16 *to = out + row * width;
        for (int64_t i = 0; i < width; i++) {
            float g = widen(gate[i]);
            to[i] = narrow(widen(narrow(g / (1.0f + exp_approx(-g)))) * widen(up[i]));
        }
    }
}

/* QK-norm if given, then RoPE, of one head: halves (a, b) become (a c - b s, b c + a s). */
static inline void rotate_head(const bf16 *in, bf16 *out, const float *cos_sin, const bf16 *norm,
                               int head_size, float eps) {
    float x[MAX_HEAD];
    for (int i = 0; i < head_size; i++) x[i] = widen(in[i]);
    if (norm) {
        float squares = 0.0f;
        for (int i = 0; i < head_size; i++) squares += x[i] * x[i];
        float scale = 1.0f / sqrtf(squares / (float)head_size + eps);
        for (int i = 0; i < head_size; i++)
            x[i] = widen(narrow(widen(narrow(x[i] * scale)) * widen(norm[i])));
    }
    int half = head_size / 2;
    const float *c = cos_sin, *s = cos_sin + half;
    for (int i = 0; i < half; i++) {
        out[i] = narrow(x[i] * c[i] - x[half + i] * s[i]);
        out[half + i] = narrow(x[half + i] * c[i] + x[i] * s[i]);
    }
}

/* q_out[T, N, H] = rotated queries; keys and values go to their slots of a layer's cache, whose
 * block b starts at b * block_stride elements. A negative slot writes nothing. */
void batchgen_kv_write(const bf16 *qkv, const float *cos_sin, const int32_t *positions,
                       const int64_t *slots, bf16 *k_cache, bf16 *v_cache, bf16 *q_out,
                       const bf16 *q_norm, const bf16 *k_norm, int64_t num_tokens, int64_t num_q,
                       int64_t num_kv, int64_t head_size, int64_t block_size,
                       int64_t block_stride, float eps) {
    int64_t columns = (num_q + 2 * num_kv) * head_size;
#pragma omp parallel for schedule(static)
    for (int64_t token = 0; token < num_tokens; token++) {
        const bf16 *row = qkv + token * columns;
        const float *angles = cos_sin + (int64_t)positions[token] * head_size;
        for (int64_t head = 0; head < num_q; head++)
            rotate_head(row + head * head_size, q_out + (token * num_q + head) * head_size, angles,
                        q_norm, (int)head_size, eps);
        if (slots[token] < 0) continue;
        int64_t place = slots[token] / block_size * block_stride +
                        slots[token] % block_size * head_size;
        for (int64_t head = 0; head < num_kv; head++) {
            int64_t to = place + head * block_size * head_size;
            rotate_head(row + (num_q + head) * head_size, k_cache + to, angles, k_norm,
                        (int)head_size, eps);
            memcpy(v_cache + to, row + (num_q + num_kv + head) * head_size,
                   (size_t)head_size * sizeof(bf16));
        }
    }
}

/* Lane i of the result is the sum of row i: sixteen horizontal sums by a tree of shuffles, which
 * pairs rows and lanes that are 8, 4, 2 and 1 apart. */
#define HALVE(WIDTH, LOW, HIGH)                                          \
    for (int i = 0; i < WIDTH; i++)                                      \
        row[i] = __builtin_shuffle(row[i], row[i + WIDTH], LOW) + \
                 __builtin_shuffle(row[i], row[i + WIDTH], HIGH)

static inline __attribute__((always_inline)) lanes sum_rows(lanes row[LANES]) {
    const int_lanes low8 = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    const int_lanes high8 = {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31};
    HALVE(8, low8, high8);
    const int_lanes low4 = {0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27};
    const int_lanes high4 = {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31};
    HALVE(4, low4, high4);
    const int_lanes low2 = {0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29};
    const int_lanes high2 = {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31};
    HALVE(2, low2, high2);
    const int_lanes low1 = {0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30};
    const int_lanes high1 = {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31};
    HALVE(1, low1, high1);
    return row[0];
}

static inline float max_lanes(lanes x) {
    float top = x[0];
    for (int i = 1; i < LANES; i++) top = x[i] > top ? x[i] : top;
    return top;
}

typedef struct {
    const bf16 *q, *k, *v; /* of the first head of a group, of the kv head within block 0 */
    bf16 *out;
    const int32_t *blocks;
    int64_t seq_len, block_size, block_stride;
    float scale;
} sequence;

/* Fetches the next sixteen tokens: blocks lie far apart, no hardware prefetcher foresees them. */
static inline void prefetch_tokens(const sequence *s, const int32_t *block, int64_t offset,
                                   int64_t left, int head_size) {
    for (left = left < LANES ? left : LANES; left > 0; block++) {
        int64_t here = s->block_size - offset < left ? s->block_size - offset : left;
        int64_t at = *block * s->block_stride + offset * head_size;
        for (int64_t i = 0; i < here * head_size; i += 32) { /* a cache line */
            __builtin_prefetch(s->k + at + i);
            __builtin_prefetch(s->v + at + i);
        }
        left -= here;
        offset = 0;
    }
}

/* Attention of one query token, all heads of a GQA group, over the paged KV of one kv head, sixteen
 * tokens at a time. `group` and `vectors` are constants in every caller, so that sums stay in
 * registers. Source: online softmax, Milakov and Gimelshein, 2018. */
static inline __attribute__((always_inline)) void attend_sequence(sequence s, const int group,
                                                                  const int vectors) {
    const int head_size = vectors * LANES;
    float query[MAX_GROUP * MAX_HEAD], max[MAX_GROUP], sum[MAX_GROUP];
    lanes acc[MAX_GROUP * MAX_HEAD / LANES];
    for (int g = 0; g < group; g++) {
        max[g] = -1e30f;
        sum[g] = 0.0f;
    }
    for (int i = 0; i < group * vectors; i++) acc[i] = (lanes){0};
    for (int i = 0; i < group * head_size; i++) query[i] = widen(s.q[i]) * s.scale * LOG2_E;
    const int32_t *block = s.blocks;
    int64_t offset = 0; /* of the next token within its block */
    for (int64_t start = 0; start < s.seq_len; start += LANES) {
        int64_t left = s.seq_len - start;
        int count = (int)(left < LANES ? left : LANES);
        const bf16 *v[LANES];
        lanes key[LANES * MAX_HEAD / LANES], weight[MAX_GROUP];
        for (int t = 0; t < count; t++) {
            int64_t at = *block * s.block_stride + offset * head_size;
            v[t] = s.v + at;
            for (int c = 0; c < vectors; c++)
                key[t * vectors + c] = load_lanes(s.k + at + c * LANES);
            if (++offset == s.block_size) {
                offset = 0;
                block++;
            }
        }
        prefetch_tokens(&s, block, offset, left - LANES, head_size);
        for (int g = 0; g < group; g++) {
            lanes row[LANES];
            for (int t = 0; t < LANES; t++) row[t] = (lanes){0};
            for (int t = 0; t < count; t++)
                for (int c = 0; c < vectors; c++)
                    row[t] += key[t * vectors + c] *
                              *(const lanes *)(query + g * head_size + c * LANES);
            lanes score = sum_rows(row);
            for (int t = count; t < LANES; t++) score[t] = -1e30f;
            float tile_max = max_lanes(score), top = max[g] > tile_max ? max[g] : tile_max;
            float rescale = exp2_approx(max[g] - top);
            weight[g] = exp2_lanes(score - top);
            for (int c = 0; c < vectors; c++) acc[g * vectors + c] *= rescale;
            sum[g] = sum[g] * rescale + sum_lanes(weight[g]);
            max[g] = top;
        }
        for (int t = 0; t < count; t++)
            for (int c = 0; c < vectors; c++) {
                lanes value = load_lanes(v[t] + c * LANES);
                for (int g = 0; g < group; g++) acc[g * vectors + c] += value * weight[g][t];
            }
    }
    for (int g = 0; g < group; g++) {
        float inverse = sum[g] > 0.0f ? 1.0f / sum[g] : 0.0f;
        for (int c = 0; c < vectors; c++) {
            lanes mean = acc[g * vectors + c] * inverse;
            for (int i = 0; i < LANES; i++) s.out[g * head_size + c * LANES + i] = narrow(mean[i]);
        }
    }
}

#define SHAPE(GROUP, VECTORS)                \
    case (GROUP) * 100 + (VECTORS):          \
        attend_sequence(s, GROUP, VECTORS);  \
        break

static void attend_any(sequence s, int group, int vectors) {
    switch (group * 100 + vectors) { /* the shapes of small models; others are right but slower */
        SHAPE(1, 4);
        SHAPE(2, 4);
        SHAPE(3, 4);
        SHAPE(4, 4);
        SHAPE(7, 4);
        SHAPE(8, 4);
        SHAPE(1, 8);
        SHAPE(2, 8);
        SHAPE(4, 8);
        SHAPE(8, 8);
        default:
            attend_sequence(s, group, vectors);
    }
}

/* out[B, N, H] = softmax(scale * q k) v over each row's paged KV; rows of length 0 give zeros. */
void batchgen_paged_decode(const bf16 *q, const bf16 *k_cache, const bf16 *v_cache,
                           const int32_t *table, const int32_t *rows, const int32_t *seq_lens,
                           bf16 *out, int64_t batch, int64_t num_q, int64_t num_kv,
                           int64_t head_size, int64_t block_size, int64_t block_stride,
                           int64_t table_stride, float scale) {
    int64_t group = num_q / num_kv;
#pragma omp parallel for schedule(dynamic, 4)
    for (int64_t item = 0; item < batch * num_kv; item++) {
        int64_t b = item / num_kv, head = item % num_kv;
        int64_t first = (b * num_q + head * group) * head_size;
        int64_t in_block = head * block_size * head_size;
        sequence s = {.q = q + first,
                      .k = k_cache + in_block,
                      .v = v_cache + in_block,
                      .out = out + first,
                      .blocks = table + rows[b] * table_stride,
                      .seq_len = seq_lens[b],
                      .block_size = block_size,
                      .block_stride = block_stride,
                      .scale = scale};
        attend_any(s, (int)group, (int)(head_size / LANES));
    }
}

/* tokens[b] = the index of the largest of a row's logits, the lowest where several are. */
void batchgen_argmax(const bf16 *logits, int64_t *tokens, int64_t batch, int64_t width) {
#pragma omp parallel for schedule(static)
    for (int64_t b = 0; b < batch; b++) {
        const bf16 *row = logits + b * width;
        float top = -INFINITY;
        int64_t part = 0, best = 0;
        for (int64_t start = 0; start < width; start += 256) { /* which part holds the largest */
            int64_t end = start + 256 < width ? start + 256 : width;
            float part_top = -INFINITY;
            for (int64_t i = start; i < end; i++) {
                float x = widen(row[i]);
                part_top = x > part_top ? x : part_top;
            }
            if (part_top > top) {
                top = part_top;
                part = start;
            }
        }
        for (best = part; best < width - 1 && widen(row[best]) != top; best++) continue;
        tokens[b] = best;
    }
}
