/* Products of bfloat16 weights where the processor multiplies pairs of bfloat16 into 32-bit sums itself (AVX-512 BF16);
 * included after the loops of AVX-512, which do all else. Inputs are taken as they are stored, in bfloat16: nothing is
 * widened, and a vector holds twice as many numbers. Subnormal numbers are 0 to these instructions.
 *
 * A dot product is summed in one order, however many rows and weights are computed beside it: a row never depends on its
 * batch.
 */
#define PAIRED 32       /* numbers of a vector */
#define TOGETHER 4      /* rows of x that share one reading of the weights */
#define NEAR 8          /* rows of x that stay in the first cache while a panel of weights passes */
#define PANEL (1 << 17) /* bytes of weights that stay in the second cache while all rows of x pass */
#define MOST_PAIRS 64   /* rows that `expert_pairs` takes */
#define SHORT 512       /* columns: up to here a dot product is mostly its end */
#define SOON 1024       /* as AHEAD, where one or two rows of x leave memory as the only limit: measured */

static INLINE __mmask32 left_of(long count)
{
    return count >= PAIRED ? ~0u : count > 0 ? (1u << count) - 1 : 0;
}

/* Each of four vectors, summed to four lanes in the order of `sum_v4`: [a, b, c, d], four lanes each. */
static INLINE __m512 quarters(__m512 a, __m512 b, __m512 c, __m512 d)
{
    const __m512 ab = _mm512_shuffle_f32x4(a, b, 0x44) + _mm512_shuffle_f32x4(a, b, 0xee);
    const __m512 cd = _mm512_shuffle_f32x4(c, d, 0x44) + _mm512_shuffle_f32x4(c, d, 0xee);
    return _mm512_shuffle_f32x4(ab, cd, 0x88) + _mm512_shuffle_f32x4(ab, cd, 0xdd);
}

/* Eight dot products in one go, each to the bit what `sum_v4` gives, from the vectors a to d and e to h -> y[8]. */
static INLINE void sum_eight(__m512 a, __m512 b, __m512 c, __m512 d, __m512 e, __m512 f, __m512 g, __m512 h, float *y)
{
    const __m512 one = quarters(a, b, c, d), other = quarters(e, f, g, h);
    const __m512 halves = _mm512_shuffle_ps(one, other, 0x88) + _mm512_shuffle_ps(one, other, 0xdd);
    const __m512 wholes = halves + _mm512_permute_ps(halves, 0xb1); /* a a e e b b f f .. */
    const __m512i order = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 10, 6, 2, 12, 8, 4, 0);
    _mm256_storeu_ps(y, _mm512_castps512_ps256(_mm512_permutexvar_ps(order, wholes)));
}

/* The i-th of eight dot products is that of line i / apart with row i % apart. Sums are variables of their own, not an
 * array: the compiler would write an array back at every step. */
#define APART(lines) ((lines) == 8 ? 1 : (lines) == 4 ? 2 : TOGETHER)
#define OF_EIGHT(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)

/* `lines` rows of weights, `stride` numbers apart, times `rows` rows of x -> y[line * APART(lines) + row]. */
static INLINE void dots_pairs(const uint16_t *w, long stride, const int lines, const uint16_t *const *x, const int rows,
                              long columns, float *y)
{
    const int apart = APART(lines);
    const long ahead = lines * rows <= 2 ? SOON : AHEAD;
    long k = 0;
#define BEGIN(i) __m512 even##i = _mm512_setzero_ps(), odd##i = _mm512_setzero_ps();
#define DOT(i, sum, load, at)                                                                                          \
    if (i / apart < lines && i % apart < rows)                                                                         \
        sum##i = _mm512_dpbf16_ps(sum##i, (__m512bh)load(w + i / apart * stride + at), (__m512bh)load(x[i % apart] + at));
#define WHOLE(from) _mm512_loadu_si512(from)
#define LEFT(from) _mm512_maskz_loadu_epi16(left, from)
#define EVEN(i) DOT(i, even, WHOLE, k)
#define ODD(i) DOT(i, odd, WHOLE, k + PAIRED)
#define EVEN_LEFT(i) DOT(i, even, LEFT, k)
#define ODD_LEFT(i) DOT(i, odd, LEFT, k + PAIRED)
    OF_EIGHT(BEGIN)
    for (; k + 2 * PAIRED <= columns; k += 2 * PAIRED) {
        for (int line = 0; line < lines; line++)
            for (int part = 0; part < 2; part++)
                __builtin_prefetch((const char *)(w + line * stride + k + part * PAIRED) + ahead, 0, 1);
        OF_EIGHT(EVEN)
        OF_EIGHT(ODD)
    }
    if (k < columns) { /* what no pair of vectors holds */
        __mmask32 left = left_of(columns - k);
        OF_EIGHT(EVEN_LEFT)
        left = left_of(columns - k - PAIRED);
        OF_EIGHT(ODD_LEFT)
    }
#define SUM(i) even##i + odd##i
    if (lines * rows == 1)
        *y = sum_v4((floats_v4)(SUM(0)));
    else
        sum_eight(SUM(0), SUM(1), SUM(2), SUM(3), SUM(4), SUM(5), SUM(6), SUM(7), y);
#undef BEGIN
#undef DOT
#undef WHOLE
#undef LEFT
#undef EVEN
#undef ODD
#undef EVEN_LEFT
#undef ODD_LEFT
#undef SUM
}

typedef void (*dots_t)(const uint16_t *, long, const uint16_t *const *, long, float *);

/* One function each, so that the sums stay in registers. */
#define DOTS(lines, rows)                                                                                              \
    static __attribute__((noinline)) void dots_##lines##_##rows(const uint16_t *w, long stride, const uint16_t *const *x, \
                                                                long columns, float *y)                                \
    {                                                                                                                  \
        dots_pairs(w, stride, lines, x, rows, columns, y);                                                             \
    }
DOTS(1, 1) DOTS(1, 2) DOTS(1, 3) DOTS(1, 4) DOTS(2, 1) DOTS(2, 2) DOTS(2, 3) DOTS(2, 4) DOTS(4, 2) DOTS(8, 1)
#undef DOTS

static const dots_t dots_of[2][TOGETHER] = {{dots_1_1, dots_1_2, dots_1_3, dots_1_4}, {dots_2_1, dots_2_2, dots_2_3, dots_2_4}};

/* Rows n to n + lines of the weights times `rows` rows of x; result n of row r goes to y[r][n]. Eight lines are for one
 * row, four for two. */
static void lines_pairs(const struct matrix *m, long n, int lines, const uint16_t *const *x, long rows, float *const *y)
{
    const uint16_t *w = (const uint16_t *)m->weights + n * m->stride;
    const long apart = APART(lines);
    for (long row = 0; row < rows; row += TOGETHER) {
        float found[2 * TOGETHER];
        const long some = rows - row < TOGETHER ? rows - row : TOGETHER;
        const dots_t dots = lines == 8 ? dots_8_1 : lines == 4 ? dots_4_2 : dots_of[lines - 1][some - 1];
        dots(w, m->stride, x + row, m->columns, found);
        for (int line = 0; line < lines; line++) {
            const float bias = m->bias ? number(m->bias + (n + line) * 2, BFLOAT16) : 0;
            for (long r = 0; r < some; r++)
                y[row + r][n + line] = m->bias ? found[line * apart + r] + bias : found[line * apart + r];
        }
    }
}

/* For few rows memory is what takes the time, and gives most where it is read in order; for more, two rows of weights
 * share what is read of x. Of short lines the most takes what is done once a dot product: so that many go together. */
static INLINE void panel_pairs(const struct matrix *m, long first, long last, const uint16_t *const *x, long rows,
                               float *const *y)
{
    const int together = rows > TOGETHER ? 2 : m->columns > SHORT ? 1 : rows == 1 ? 8 : rows == 2 ? 4 : 2;
    long n = first;
    for (; n + together <= last; n += together)
        lines_pairs(m, n, together, x, rows, y);
    for (; n < last; n++)
        lines_pairs(m, n, 1, x, rows, y);
}

#include "products_pairs_coded.h"

static void multiply_pairs(const struct matrix *m, int dtype, const float *const *x, long rows, float *const *y, long first,
                           long last)
{
    if (dtype == FLOAT32) {
        multiply_v4(m, dtype, x, rows, y, first, last);
        return;
    }
    if (m->scales) {
        multiply_pairs_coded(m, (const uint16_t *const *)x, rows, y, first, last);
        return;
    }
    if (m->across) { /* bound by memory: widened, as elsewhere */
        across_v4(m, BFLOAT16, 1, x, rows, y, first, last);
        return;
    }
    const long panel = PANEL / (2 * m->stride) / 2 * 2 + 2;
    for (; first < last; first += panel)
        for (long row = 0; row < rows; row += NEAR)
            panel_pairs(m, first, first + panel < last ? first + panel : last, (const uint16_t *const *)x + row,
                        rows - row < NEAR ? rows - row : NEAR, y + row);
}

/* inner [gate, up] or [up] -> [inner] as `multiply_pairs` takes it, in place */
static void activate_pairs(const struct layout *l, float *inner)
{
    activate_v4(l, inner);
    if (l->dtype == FLOAT32)
        return;
    for (long i = 0; i < l->inner; i += LONGEST_VECTOR) {
        const __mmask16 left = l->inner - i < LONGEST_VECTOR ? (1u << (l->inner - i)) - 1 : 0xffff;
        const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(left, inner + i));
        _mm256_mask_storeu_epi16((uint16_t *)inner + i, left, rounded);
    }
}

/* As `expert` of AVX-512, for experts that few tokens go to, at most MOST_PAIRS of them: bit for bit what they get one by
 * one. */
static void expert_pairs(const struct layout *l, const char *slot, const char *x, long top_k, const long *pairs, long count,
                         float *y, float *room)
{
    const struct matrix up = up_of(l, slot), down = down_of(l, slot);
    float *inputs[MOST_PAIRS] = {NULL}, *inner[MOST_PAIRS] = {NULL}, *outputs[MOST_PAIRS] = {NULL};
    for (long row = 0; row < count; row++) {
        inputs[row] = room + row * pitch(l->hidden);
        inner[row] = room + count * pitch(l->hidden) + row * pitch(up.rows);
        outputs[row] = y + pairs[row] * l->hidden;
        memcpy(inputs[row], x + pairs[row] / top_k * l->hidden * 2, l->hidden * 2);
    }
    multiply_pairs(&up, l->dtype, (const float *const *)inputs, count, inner, 0, up.rows);
    for (long row = 0; row < count; row++)
        activate_pairs(l, inner[row]);
    multiply_pairs(&down, l->dtype, (const float *const *)inner, count, outputs, 0, down.rows);
}
