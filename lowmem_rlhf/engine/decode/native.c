/* For a CPU with AVX-512 bf16: products of few rows, and one token of each row through the layers of a Llama-shaped
   decoder, which is what fast_decoder.py computes without a dispatch for each of its operations. Tensors are bfloat16 and
   rounded where torch's operations round theirs, but for attention, which is fp32 from the scores to its result, and
   a product with its bias and adapters, which is rounded once. Between the products each row is one thread's.
   native.py holds the same structures. */
#include <immintrin.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>

typedef uint16_t bf16;

enum { BLOCK = 64, PARTS = 3 };
/* Sums of ROWS rows by OUTPUTS outputs stay in registers; at an edge the last one is computed again. */
enum { ROWS = 4, OUTPUTS = 4, AHEAD = 32 };
enum { TOGETHER = 4 }; /* query heads that meet a key head's keys at once */
static const __mmask32 ALL = 0xFFFFFFFF;
#define ALWAYS_INLINE inline __attribute__((always_inline))

typedef struct { /* layers with one input, and their adapters */
    const uint8_t *codes[PARTS]; /* of each layer (out, in / 2), NF4 as bitsandbytes has it: the even column is high */
    const float *scales[PARTS];  /* (out, in / BLOCK) */
    const bf16 *bias;            /* (sum of out), or null */
    const bf16 *a, *b[PARTS];    /* (sum of ranks, in), of each layer (out, ranks); or null */
    int64_t in, out, parts, outs[PARTS], ranks[PARTS];
} Linear;

typedef struct {
    Linear qkv, o, gate_up, down;
    const bf16 *attention_norm, *mlp_norm;
    const bf16 *prompt_k, *prompt_v; /* (B * nkv, d, P), (B * nkv, P, d) */
    bf16 *own_k, *own_v;             /* (B * nkv * slots, d, room), (B * nkv * slots, room, d) */
} Layer;

typedef struct {
    int64_t layers, rows, hidden, heads, kv_heads, head_size, inner;
    int64_t slots, longest, room, length; /* length: tokens of each completion, this one included */
    int64_t threads, scratch_size;
    float scaling, eps;
    const int64_t *prompt, *slot, *prompt_length; /* of each row */
    const bf16 *cos, *sin;                        /* (rows, d); the first half of sin is negated */
    bf16 *x, *normed, *wide, *narrow; /* x (rows, hidden) comes in and goes out; room for the widest */
    bf16 *sorted, *xa;                /* room for `lowmem_multiply` */
    float *scratch;                   /* (threads, scratch_size) */
} Pass;

static inline float up(bf16 v) {
    union { uint32_t bits; float value; } c = {(uint32_t)v << 16};
    return c.value;
}

static inline bf16 down(float v) { /* to the nearest, ties to even */
    union { float value; uint32_t bits; } c = {v};
    uint32_t even = c.bits + 0x7FFFu + ((c.bits >> 16) & 1u);
    return (c.bits & 0x7FFFFFFFu) > 0x7F800000u ? (bf16)0x7FC0 : (bf16)(even >> 16);
}

static inline float rounded(float v) { return up(down(v)); }

static inline float exponential(float x) { /* Cephes' expf, to 2 units in the last place */
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f; /* to the nearest integer */
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    union { int32_t bits; float value; } scale = {((int32_t)n + 127) << 23};
    return (p * r * r + r + 1.0f) * scale.value;
}

/* Return the sums of 16 vectors' elements, in the order of the vectors. */
static inline __m512 sums_of(const __m512 *v) {
    __m512 of_four[4];
    for (int64_t i = 0; i < 4; i++, v += 4) {
        __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
        __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
        __m512d low = _mm512_unpacklo_pd((__m512d)a, (__m512d)b), high = _mm512_unpackhi_pd((__m512d)a, (__m512d)b);
        of_four[i] = _mm512_add_ps((__m512)low, (__m512)high);
    }
    __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(of_four[0], of_four[1], 0x44),
                             _mm512_shuffle_f32x4(of_four[0], of_four[1], 0xEE));
    __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(of_four[2], of_four[3], 0x44),
                             _mm512_shuffle_f32x4(of_four[2], of_four[3], 0xEE));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xDD));
}

static inline __m512bh load(const bf16 *from, __mmask32 which) {
    return (__m512bh)(which == ALL ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(which, from));
}

/* Add the products of ROWS rows x and OUTPUTS rows w: 32 numbers of each from k on, or `which` of these. */
static inline void add_products(__m512 sums[ROWS][OUTPUTS], const bf16 *const *x, const bf16 *const *w, int64_t k,
                                __mmask32 which) {
    __m512bh of_w[OUTPUTS];
    for (int64_t j = 0; j < OUTPUTS; j++) of_w[j] = load(w[j] + k, which);
    for (int64_t i = 0; i < ROWS; i++) {
        __m512bh of_x = load(x[i] + k, which);
        for (int64_t j = 0; j < OUTPUTS; j++) sums[i][j] = _mm512_dpbf16_ps(sums[i][j], of_x, of_w[j]);
    }
}

typedef struct { /* what a product has beside its weights */
    const bf16 *xa, *b, *bias; /* x A^T (rows, xa_stride) and B (outputs, ranks); bias (outputs); or null */
    int64_t xa_stride, ranks;
} Beside;

/* y (rows, y_stride) = x (rows, in) times OUTPUTS rows of weights, of which the first `outputs` are wanted. */
static void product(int64_t rows, int64_t in, const bf16 *x, const bf16 *const *w, bf16 *y, int64_t y_stride,
                    int64_t outputs, int64_t ahead, const Beside *beside) {
    int64_t tiles = (rows + ROWS - 1) / ROWS;
    float bias[OUTPUTS] = {0};
    for (int64_t j = 0; beside && beside->bias && j < outputs; j++) bias[j] = up(beside->bias[j]);
    for (int64_t r = 0; r < rows; r += ROWS) {
        const bf16 *xs[ROWS];
        for (int64_t i = 0; i < ROWS; i++) xs[i] = x + (r + i < rows ? r + i : rows - 1) * in;
        __m512 sums[ROWS][OUTPUTS];
        for (int64_t i = 0; i < ROWS; i++)
            for (int64_t j = 0; j < OUTPUTS; j++) sums[i][j] = _mm512_setzero_ps();
        for (int64_t k = 0; k < in; k += 32) {
            if (ahead) /* a part of what is needed soon with each tile */
                for (int64_t j = r / ROWS; j < OUTPUTS; j += tiles)
                    _mm_prefetch((const char *)(w[j] + ahead * in + k), _MM_HINT_T0);
            add_products(sums, xs, w, k, ALL);
        }
        if (beside && beside->b) {
            const bf16 *as[ROWS], *bs[OUTPUTS];
            for (int64_t i = 0; i < ROWS; i++)
                as[i] = beside->xa + (r + i < rows ? r + i : rows - 1) * beside->xa_stride;
            for (int64_t j = 0; j < OUTPUTS; j++)
                bs[j] = beside->b + (j < outputs ? j : outputs - 1) * beside->ranks;
            for (int64_t k = 0; k < beside->ranks; k += 32) {
                int64_t left = beside->ranks - k;
                add_products(sums, as, bs, k, left < 32 ? ((__mmask32)1 << left) - 1 : ALL);
            }
        }
        bf16 results[ROWS][OUTPUTS];
        __m512 whole = _mm512_add_ps(sums_of(sums[0]), _mm512_broadcast_f32x4(_mm_loadu_ps(bias)));
        _mm256_storeu_si256((__m256i *)results, (__m256i)_mm512_cvtneps_pbh(whole));
        for (int64_t i = 0; i < ROWS && r + i < rows; i++)
            for (int64_t j = 0; j < outputs; j++) y[(r + i) * y_stride + j] = results[i][j];
    }
}

/* Write a row of NF4 weights as the bfloat16 numbers that bitsandbytes makes of them; in is a multiple of BLOCK.
   Of each block the even ones come first, then the odd ones, as in what `sort` makes of the other factor. */
static void dequantize(const uint8_t *codes, const float *scales, bf16 *w, int64_t in) {
    const __m512 values = _mm512_setr_ps( /* QLoRA, arXiv 2305.14314, appendix E */
        -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
        -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
        0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f,
        1.0f);
    for (int64_t k = 0; k < in; k += BLOCK) {
        __m256i scaled = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(values, _mm512_set1_ps(scales[k / BLOCK])));
        __m512i table = _mm512_broadcast_i64x4(scaled); /* twice, as 5 bits of an index count */
        __m512i pairs = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i *)(codes + k / 2)));
        _mm512_storeu_si512(w + k, _mm512_permutexvar_epi16(_mm512_srli_epi16(pairs, 4), table));
        _mm512_storeu_si512(w + k + BLOCK / 2, _mm512_permutexvar_epi16(pairs, table));
    }
}

/* Write x in the order of dequantized weights. */
static void sort(const bf16 *x, bf16 *sorted, int64_t n) {
    bf16 order[BLOCK];
    for (int64_t i = 0; i < BLOCK / 2; i++) order[i] = (bf16)(2 * i), order[i + BLOCK / 2] = (bf16)(2 * i + 1);
    __m512i even = _mm512_loadu_si512(order), odd = _mm512_loadu_si512(order + BLOCK / 2);
    for (int64_t k = 0; k < n; k += BLOCK) {
        __m512i first = _mm512_loadu_si512(x + k), second = _mm512_loadu_si512(x + k + BLOCK / 2);
        _mm512_storeu_si512(sorted + k, _mm512_permutex2var_epi16(first, even, second));
        _mm512_storeu_si512(sorted + k + BLOCK / 2, _mm512_permutex2var_epi16(first, odd, second));
    }
}

/* Sibling layers' outputs for x (rows, in), side by side in y (rows, out).
   sorted, xa: room for (rows, in) and (rows, sum of ranks). */
void lowmem_multiply(const Linear *l, int64_t rows, const bf16 *x, bf16 *y, bf16 *sorted, bf16 *xa, int64_t threads) {
    int64_t tiles[PARTS + 1] = {0}, ranks = 0;
    for (int64_t part = 0; part < l->parts; part++) {
        tiles[part + 1] = tiles[part] + (l->outs[part] + OUTPUTS - 1) / OUTPUTS;
        ranks += l->ranks[part];
    }
#pragma omp parallel num_threads(threads)
    {
        bf16 dense[OUTPUTS * l->in];
        const bf16 *w[OUTPUTS];
#pragma omp for schedule(static) nowait
        for (int64_t row = 0; row < rows; row++) sort(x + row * l->in, sorted + row * l->in, l->in);
#pragma omp for schedule(static)
        for (int64_t o = 0; o < ranks; o += OUTPUTS) {
            for (int64_t j = 0; j < OUTPUTS; j++) w[j] = l->a + (o + j < ranks ? o + j : ranks - 1) * l->in;
            product(rows, l->in, x, w, xa + o, ranks, ranks - o < OUTPUTS ? ranks - o : OUTPUTS, 0, 0);
        }
        for (int64_t j = 0; j < OUTPUTS; j++) w[j] = dense + j * l->in;
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles[l->parts]; tile++) {
            int64_t part = 0, at = 0, rank = 0;
            for (; tile >= tiles[part + 1]; part++) at += l->outs[part], rank += l->ranks[part];
            int64_t o = (tile - tiles[part]) * OUTPUTS, left = l->outs[part] - o;
            int64_t outputs = left < OUTPUTS ? left : OUTPUTS;
            for (int64_t j = 0; j < outputs; j++)
                dequantize(l->codes[part] + (o + j) * l->in / 2, l->scales[part] + (o + j) * (l->in / BLOCK),
                           dense + j * l->in, l->in);
            Beside beside = {xa + rank, l->a && l->ranks[part] ? l->b[part] + o * l->ranks[part] : 0,
                             l->bias ? l->bias + at + o : 0, ranks, l->ranks[part]};
            product(rows, l->in, sorted, w, y + at + o, l->out, outputs, 0, &beside);
        }
    }
}

/* y (rows, out) = x w^T for 16-bit weights w (out, in) as they lie; in is a multiple of 32. */
void lowmem_product(int64_t rows, int64_t out, int64_t in, const bf16 *x, const bf16 *w, bf16 *y, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t o = 0; o < out; o += OUTPUTS) {
        const bf16 *ws[OUTPUTS];
        for (int64_t j = 0; j < OUTPUTS; j++) ws[j] = w + (o + j < out ? o + j : out - 1) * in;
        product(rows, in, x, ws, y + o, out, out - o < OUTPUTS ? out - o : OUTPUTS, AHEAD, 0);
    }
}

static void normalise(const bf16 *x, const bf16 *weight, bf16 *y, int64_t n, float eps) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += up(x[i]) * up(x[i]);
    float scale = 1.0f / sqrtf(sum / (float)n + eps);
#pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = down(rounded(up(x[i]) * scale) * up(weight[i]));
}

/* y = silu(gate) * upper. */
static void activate(int64_t n, const bf16 *gate, const bf16 *upper, bf16 *y) {
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float g = up(gate[i]);
        y[i] = down(rounded(g / (1.0f + exponential(-g))) * up(upper[i]));
    }
}

/* Turn a head by its position (RoFormer, arXiv 2104.09864, in halves) into floats. */
static void turn(const bf16 *x, const bf16 *cos, const bf16 *sin, float *y, int64_t d) {
    int64_t half = d / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        y[i] = rounded(rounded(up(x[i]) * up(cos[i])) + up(x[i + half]) * up(sin[i]));
        y[i + half] = rounded(rounded(up(x[i + half]) * up(cos[i + half])) + up(x[i]) * up(sin[i + half]));
    }
}

static inline __mmask16 up_to(int64_t left) { return left < 16 ? (__mmask16)((1u << left) - 1) : 0xFFFF; }

static inline __m512 floats(const bf16 *from, __mmask16 which) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(which, from)), 16);
}

/* Write the products of `count` queries q (count, d) with keys k (d, stride) into scores (count, room). */
static ALWAYS_INLINE void scores_of(int count, const float *q, const bf16 *k, int64_t d, int64_t stride, int64_t keys,
                                    float *scores, int64_t room) {
    for (int64_t n = 0; n < keys; n += 16) {
        __mmask16 which = up_to(keys - n);
        __m512 sums[TOGETHER];
        for (int j = 0; j < count; j++) sums[j] = _mm512_setzero_ps();
        for (int64_t i = 0; i < d; i++) {
            __m512 ki = floats(k + i * stride + n, which);
            for (int j = 0; j < count; j++) sums[j] = _mm512_fmadd_ps(_mm512_set1_ps(q[j * d + i]), ki, sums[j]);
        }
        for (int j = 0; j < count; j++) _mm512_mask_storeu_ps(scores + j * room + n, which, sums[j]);
    }
}

/* Add values v (keys, d), weighted by each of `count` queries' scores (count, room), to out (count, d). */
static ALWAYS_INLINE void add_values(int count, const float *scores, int64_t room, const bf16 *v, int64_t d,
                                     int64_t keys, float *out) {
    for (int64_t i = 0; i < d; i += 16) {
        __mmask16 which = up_to(d - i);
        __m512 sums[TOGETHER];
        for (int j = 0; j < count; j++) sums[j] = _mm512_maskz_loadu_ps(which, out + j * d + i);
        for (int64_t n = 0; n < keys; n++) {
            __m512 vn = floats(v + n * d + i, which);
            for (int j = 0; j < count; j++)
                sums[j] = _mm512_fmadd_ps(_mm512_set1_ps(scores[j * room + n]), vn, sums[j]);
        }
        for (int j = 0; j < count; j++) _mm512_mask_storeu_ps(out + j * d + i, which, sums[j]);
    }
}

/* Put weights that sum up to one in place of scores. */
static void softmax(float *scores, int64_t keys) {
    float most = scores[0], sum = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t n = 0; n < keys; n++) most = scores[n] > most ? scores[n] : most;
#pragma omp simd reduction(+ : sum)
    for (int64_t n = 0; n < keys; n++) {
        scores[n] = exponential(scores[n] - most);
        sum += scores[n];
    }
#pragma omp simd
    for (int64_t n = 0; n < keys; n++) scores[n] /= sum;
}

/* The keys and values of one row and key head. */
typedef struct {
    const bf16 *prompt_k, *prompt_v, *own_k, *own_v;
    int64_t prompt;
} Keys;

/* `count` query heads of one row, which share a key head, into out (count, d). */
static ALWAYS_INLINE void attend_heads(int count, const Pass *p, const Keys *keys, const bf16 *q, const bf16 *cos,
                                       const bf16 *sin, bf16 *out, float *scratch) {
    int64_t d = p->head_size, all = keys->prompt + p->length;
    float *turned = scratch, *result = scratch + TOGETHER * d, *scores = result + TOGETHER * d;
    for (int j = 0; j < count; j++) turn(q + j * d, cos, sin, turned + j * d, d);
    for (int64_t i = 0; i < count * d; i++) turned[i] *= p->scaling, result[i] = 0.0f;
    scores_of(count, turned, keys->prompt_k, d, p->longest, keys->prompt, scores, all);
    scores_of(count, turned, keys->own_k, d, p->room, p->length, scores + keys->prompt, all);
    for (int j = 0; j < count; j++) softmax(scores + j * all, all);
    add_values(count, scores, all, keys->prompt_v, d, keys->prompt, result);
    add_values(count, scores + keys->prompt, all, keys->own_v, d, p->length, result);
    for (int64_t i = 0; i < count * d; i++) out[i] = down(result[i]);
}

/* One row: turn q and k, store k and v, attend to the prompt and to what the completion has so far. */
static void attend(const Pass *p, const Layer *l, int64_t row, const bf16 *qkv, bf16 *out, float *scratch) {
    int64_t d = p->head_size, share = p->heads / p->kv_heads;
    const bf16 *cos = p->cos + row * d, *sin = p->sin + row * d;
    for (int64_t h = 0; h < p->kv_heads; h++) {
        int64_t of_prompt = p->prompt[row] * p->kv_heads + h, own = of_prompt * p->slots + p->slot[row];
        bf16 *own_k = l->own_k + own * d * p->room, *own_v = l->own_v + own * d * p->room;
        turn(qkv + (p->heads + h) * d, cos, sin, scratch, d);
        for (int64_t i = 0; i < d; i++) own_k[i * p->room + p->length - 1] = down(scratch[i]);
        const bf16 *value = qkv + (p->heads + p->kv_heads + h) * d;
        for (int64_t i = 0; i < d; i++) own_v[(p->length - 1) * d + i] = value[i];
        Keys keys = {l->prompt_k + of_prompt * d * p->longest, l->prompt_v + of_prompt * d * p->longest, own_k, own_v,
                     p->prompt_length[row]};
        for (int64_t head = h * share, end = head + share; head < end; head += TOGETHER) {
            const bf16 *q = qkv + head * d;
            bf16 *y = out + head * d;
            switch (end - head) {
            case 1: attend_heads(1, p, &keys, q, cos, sin, y, scratch); break;
            case 2: attend_heads(2, p, &keys, q, cos, sin, y, scratch); break;
            case 3: attend_heads(3, p, &keys, q, cos, sin, y, scratch); break;
            default: attend_heads(TOGETHER, p, &keys, q, cos, sin, y, scratch);
            }
        }
    }
}

/* Add a product in `wide` to the row, and make it the next one's input. */
static void add_and_normalise(const Pass *p, int64_t row, const bf16 *weight) {
    bf16 *x = p->x + row * p->hidden, *y = p->wide + row * p->hidden;
#pragma omp simd
    for (int64_t i = 0; i < p->hidden; i++) x[i] = down(up(x[i]) + up(y[i]));
    if (weight) normalise(x, weight, p->normed + row * p->hidden, p->hidden, p->eps);
}

#define EACH_ROW                                                                                                       \
    _Pragma("omp parallel for num_threads(p->threads) schedule(static)") for (int64_t row = 0; row < p->rows; row++)

void lowmem_decode(const Pass *p, const Layer *layers) {
    EACH_ROW normalise(p->x + row * p->hidden, layers->attention_norm, p->normed + row * p->hidden, p->hidden, p->eps);
    for (int64_t n = 0; n < p->layers; n++) {
        const Layer *l = layers + n;
        lowmem_multiply(&l->qkv, p->rows, p->normed, p->wide, p->sorted, p->xa, p->threads);
        EACH_ROW {
            float *scratch = p->scratch + omp_get_thread_num() * p->scratch_size;
            attend(p, l, row, p->wide + row * l->qkv.out, p->narrow + row * l->o.in, scratch);
        }
        lowmem_multiply(&l->o, p->rows, p->narrow, p->wide, p->sorted, p->xa, p->threads);
        EACH_ROW add_and_normalise(p, row, l->mlp_norm);
        lowmem_multiply(&l->gate_up, p->rows, p->normed, p->wide, p->sorted, p->xa, p->threads);
        EACH_ROW {
            bf16 *gate = p->wide + row * 2 * p->inner, *upper = gate + p->inner, *y = p->narrow + row * p->inner;
            activate(p->inner, gate, upper, y);
        }
        lowmem_multiply(&l->down, p->rows, p->narrow, p->wide, p->sorted, p->xa, p->threads);
        EACH_ROW add_and_normalise(p, row, n + 1 < p->layers ? l[1].attention_norm : 0);
    }
}

