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

enum { MAX_GROUP = 16, MAX_HEAD = 256, LANES = 16, PART = 64 };

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

/* Attention of one query token, `group` heads of it, over `count` tokens of one kv head, added to a
 * running softmax per head. `group` and `vectors` are constants in every caller, so that queries and
 * sums stay in registers. Source: online softmax, Milakov and Gimelshein, 2018. */
static inline __attribute__((always_inline)) void attend_part(
    const float *q, const bf16 *k, const bf16 *v, int count, const int group, const int vectors,
    float *max, float *sum, lanes *acc) {
    float scores[MAX_GROUP][PART];
    const int head_size = vectors * LANES;
    for (int t = 0; t < count; t++) {
        lanes partial[MAX_GROUP];
        for (int g = 0; g < group; g++) partial[g] = (lanes){0};
        for (int c = 0; c < vectors; c++) {
            lanes key = load_lanes(k + t * head_size + c * LANES);
            for (int g = 0; g < group; g++)
                partial[g] += key * *(const lanes *)(q + g * head_size + c * LANES);
        }
        for (int g = 0; g < group; g++) scores[g][t] = sum_lanes(partial[g]);
    }
    for (int g = 0; g < group; g++) {
        float top = max[g], total = 0.0f;
        for (int t = 0; t < count; t++) top = scores[g][t] > top ? scores[g][t] : top;
        float rescale = exp2_approx(max[g] - top);
        for (int t = 0; t < count; t++) {
            scores[g][t] = exp2_approx(scores[g][t] - top);
            total += scores[g][t];
        }
        for (int c = 0; c < vectors; c++) acc[g * vectors + c] *= rescale;
        max[g] = top;
        sum[g] = sum[g] * rescale + total;
    }
    for (int t = 0; t < count; t++)
        for (int c = 0; c < vectors; c++) {
            lanes value = load_lanes(v + t * head_size + c * LANES);
            for (int g = 0; g < group; g++) acc[g * vectors + c] += value * scores[g][t];
        }
}

typedef struct {
    const bf16 *q, *k, *v; /* of the first head of a group, of the kv head within block 0 */
    bf16 *out;
    const int32_t *blocks;
    int64_t seq_len, block_size, block_stride;
    float scale;
} sequence;

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
    for (int64_t start = 0; start < s.seq_len; start += s.block_size) {
        int64_t left = s.seq_len - start, at = s.blocks[start / s.block_size] * s.block_stride;
        int count = (int)(left < s.block_size ? left : s.block_size);
        if (left > s.block_size) { /* blocks lie far apart: no hardware prefetcher foresees it */
            int64_t next = s.blocks[start / s.block_size + 1] * s.block_stride;
            for (int64_t i = 0; i < s.block_size * head_size; i += 64 / (int64_t)sizeof(bf16)) {
                __builtin_prefetch(s.k + next + i);
                __builtin_prefetch(s.v + next + i);
            }
        }
        for (int done = 0; done < count; done += PART) {
            int part = count - done < PART ? count - done : PART;
            int64_t from = at + done * head_size;
            attend_part(query, s.k + from, s.v + from, part, group, vectors, max, sum, acc);
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
