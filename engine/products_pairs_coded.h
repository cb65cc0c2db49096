/* Quantised weights where the processor multiplies pairs of bfloat16 itself; included by products_pairs.h. Few rows are
 * multiplied with codes that are looked up in registers, and scales come after the sums; for many, or where these loops do
 * not know the blocks, weights are unpacked into the cache and rounded to bfloat16 once.
 */

#define CODED_ROWS 4          /* of inputs that share what is looked up */
#define CODED_PANEL (1 << 16) /* bytes of weights that stay in the second cache while all rows pass */

typedef void (*dots_coded_t)(const struct matrix *, long, const uint16_t *const *, float *);

#include "products_pairs_four.h"
#define DOTS(lines, rows)                                                                                              \
    static __attribute__((noinline)) void mxfp4_##lines##_##rows(const struct matrix *m, long n, const uint16_t *const *x, \
                                                                 float *y)                                             \
    {                                                                                                                  \
        dots_four(m, n, lines, x, rows, MXFP4, y);                                                                     \
    }                                                                                                                  \
    static __attribute__((noinline)) void int4_##lines##_##rows(const struct matrix *m, long n, const uint16_t *const *x, \
                                                                float *y)                                              \
    {                                                                                                                  \
        dots_four(m, n, lines, x, rows, INT4, y);                                                                      \
    }
DOTS(1, 1) DOTS(1, 2) DOTS(1, 3) DOTS(1, 4) DOTS(4, 1) DOTS(8, 1) DOTS(4, 2) DOTS(2, 3) DOTS(2, 4)
#undef DOTS
#pragma GCC push_options
#pragma GCC target("avx512vbmi")
#include "products_pairs_eight.h"
#pragma GCC pop_options

/* How few rows go through weights of one kind. */
struct way {
    void (*lay_out)(const uint16_t *, long, uint16_t *);
    dots_coded_t alone[CODED_ROWS], beside[CODED_ROWS], eight;
};

#define WAY(name, lay_out)                                                                                             \
    {lay_out, {name##_1_1, name##_1_2, name##_1_3, name##_1_4}, {name##_4_1, name##_4_2, name##_2_3, name##_2_4}, name##_8_1}
static const struct way coded_ways[] = {
    [MXFP4] = WAY(mxfp4, in_fours), [INT4] = WAY(int4, in_fours), [FP8] = WAY(eight, in_eights)};
#undef WAY

static int looks_up_bytes(void)
{
    return __builtin_cpu_supports("avx512vbmi") != 0;
}

/* Whether the loops for few rows know this matrix's blocks. */
static INLINE int is_looked_up(const struct matrix *m)
{
    const long shared = m->coding.columns;
    if (m->coding.way == MXFP4)
        return 1;
    if (m->coding.way == INT4)
        return m->coding.dtype == BFLOAT16 &&
               (shared == GROUP || shared == 2 * GROUP || shared % SPAN == 0);
    return shared % STRETCH == 0 && looks_up_bytes();
}

/* Rows `first` to `last` of the weights times at most CODED_ROWS rows of x, laid out. */
static void lines_coded(const struct way *way, const struct matrix *m, const uint16_t *const *x, long rows, float *const *y,
                        long first, long last)
{
    const int many = rows == 1 && m->columns <= SHORT; /* of short lines the most takes what is done once for each */
    const long most = many ? 8 : rows <= 2 ? 4 : 2;
    for (long lines; first < last; first += lines) {
        float found[2 * TOGETHER];
        lines = last - first < most ? 1 : most;
        for (long line = 0; line < lines; line += 2)
            __builtin_prefetch(row_scales(m, first + line) + AHEAD / 16, 0, 1);
        (lines == 1 ? way->alone[rows - 1] : many ? way->eight : way->beside[rows - 1])(m, first, x, found);
        for (long line = 0; line < lines; line++) {
            const float bias = m->bias ? number(m->bias + (first + line) * 2, BFLOAT16) : 0;
            for (long row = 0; row < rows; row++)
                y[row][first + line] = m->bias ? found[line * rows + row] + bias : found[line * rows + row];
        }
    }
}

/* Thirty-two numbers of bfloat16 times their scale, rounded once. */
static INLINE __m512i scaled(__m512i words, __m512 scale)
{
    const __m512i low = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(words)), 16);
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(words, 1)), 16);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_castsi512_ps(high) * scale, _mm512_castsi512_ps(low) * scale);
}

static INLINE void unpack_integers(const struct matrix *m, const char *from, const char *scales, uint16_t *to)
{
    const __m512i values = table_v4(INTEGERS);
    const long shared = shared_columns(m), size = size_of(m->coding.dtype);
    for (long k = 0; k < m->columns; scales += size) {
        const __m512 scale = _mm512_set1_ps(stored_scale(scales, m->coding.dtype));
        for (const long end = k + shared; k < end; k += GROUP)
            _mm512_storeu_si512(to + k, scaled(_mm512_permutexvar_epi16(codes_v4(from + k / 2), values), scale));
    }
}

#pragma GCC push_options
#pragma GCC target("avx512vbmi")
static INLINE void unpack_eights(const struct matrix *m, const char *from, const char *scales, uint16_t *to)
{
    const struct bytes tables = byte_tables();
    const __m512i order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0); /* so that neighbours stay neighbours */
    const long shared = shared_columns(m), size = size_of(m->coding.dtype);
    for (long block = 0; block < m->columns; block += shared, scales += size) {
        const __m512 scale = _mm512_set1_ps(stored_scale(scales, m->coding.dtype));
        const long end = block + shared < m->columns ? block + shared : m->columns;
        for (long k = block; k < end; k += STRETCH) {
            const __mmask64 bytes = end - k >= STRETCH ? ~0ull : (1ull << (end - k)) - 1;
            const __m512i codes = _mm512_permutexvar_epi64(order, _mm512_maskz_loadu_epi8(bytes, from + k));
            const __m512i lower = lower_bytes(tables, codes), upper = upper_bytes(tables, codes);
            _mm512_mask_storeu_epi16(to + k, left_of(end - k), scaled(_mm512_unpacklo_epi8(lower, upper), scale));
            _mm512_mask_storeu_epi16(to + k + PAIRED, left_of(end - k - PAIRED), scaled(_mm512_unpackhi_epi8(lower, upper), scale));
        }
    }
}

static void unpack_rows_of_eights(const struct matrix *m, long n, long count, char *to)
{
    for (const long end = n + count; n < end; n++, to += 2 * m->columns)
        unpack_eights(m, m->weights + n * m->columns, row_scales(m, n), (uint16_t *)to);
}
#pragma GCC pop_options

/* As `unpack` of AVX-512, to the bit but for numbers below the normal range of bfloat16, which become 0. */
static void unpack_pairs(const struct matrix *m, int dtype, long n, long count, char *to)
{
    if (dtype == FLOAT32 || m->coding.way == MXFP4 || (m->coding.way == FP8 && !looks_up_bytes())) {
        unpack_v4(m, dtype, n, count, to);
        return;
    }
    if (m->coding.way == FP8) {
        unpack_rows_of_eights(m, n, count, to);
        return;
    }
    const long step = coded_row(m);
    for (const long end = n + count; n < end; n++, to += 2 * m->columns)
        unpack_integers(m, m->weights + n * step, row_scales(m, n), (uint16_t *)to);
}

static void multiply_pairs(const struct matrix *, int, const float *const *, long, float *const *, long, long);

static void multiply_pairs_coded(const struct matrix *m, const uint16_t *const *x, long rows, float *const *y, long first,
                                 long last)
{
    if (!is_looked_up(m)) {
        multiply_coded(unpack_pairs, multiply_pairs, m, BFLOAT16, (const float *const *)x, rows, y, first, last);
        return;
    }
    char room[CODED_ROWS * WIDEST + LINE];
    const struct way *way = &coded_ways[m->coding.way];
    const long width = SPANS(m->columns) * SPAN, panel = CODED_PANEL / coded_row(m) / 8 * 8 + 8;
    uint16_t *laid_out = (uint16_t *)aligned((float *)room);
    for (long begin = first; first < last; first += panel)
        for (long row = 0; row < rows; row += CODED_ROWS) {
            const long some = rows - row < CODED_ROWS ? rows - row : CODED_ROWS;
            const uint16_t *inputs[CODED_ROWS];
            for (long r = 0; r < some; r++) {
                inputs[r] = laid_out + r * width;
                if (first == begin || rows > CODED_ROWS) /* else they are there */
                    way->lay_out(x[row + r], m->columns, laid_out + r * width);
            }
            lines_coded(way, m, inputs, some, y + row, first, first + panel < last ? first + panel : last);
        }
}
