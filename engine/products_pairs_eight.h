/* Dot products of eight-bit floats with few rows of bfloat16, where the processor looks bytes up in tables of 128 (AVX-512
 * VBMI); included by products_pairs_coded.h. Both bytes of what sixty-four codes are in bfloat16 are looked up and put
 * beside each other: two vectors, of the first and the second eight of every sixteen. Inputs are laid out so once. Scales
 * multiply what a block's columns make.
 *
 * A dot product is summed in one order, however many rows and weights are computed beside it: a row never depends on its
 * batch.
 */

#define STRETCH 64 /* numbers of a row that are computed together */

/* One row [columns] -> [columns / STRETCH][2][PAIRED], zeros behind its end. */
static void in_eights(const uint16_t *x, long columns, uint16_t *to)
{
    for (long k = 0; k < columns; k += STRETCH, to += STRETCH) {
        const __m512i first = _mm512_maskz_loadu_epi16(left_of(columns - k), x + k);
        const __m512i second = _mm512_maskz_loadu_epi16(left_of(columns - k - PAIRED), x + k + PAIRED);
        _mm512_storeu_si512(to, _mm512_shuffle_i64x2(first, second, 0x88));
        _mm512_storeu_si512(to + PAIRED, _mm512_shuffle_i64x2(first, second, 0xdd));
    }
}

/* Of magnitudes in bfloat16 the lower and the upper bytes; those below the normal range of eight bits come first. */
#define LOWER(e)                                                                                                       \
    (e & 1) << 7, (e & 1) << 7 | 16, (e & 1) << 7 | 32, (e & 1) << 7 | 48, (e & 1) << 7 | 64, (e & 1) << 7 | 80,       \
        (e & 1) << 7 | 96, (e & 1) << 7 | 112
#define UPPER(e)                                                                                                       \
    (e + 120) >> 1, (e + 120) >> 1, (e + 120) >> 1, (e + 120) >> 1, (e + 120) >> 1, (e + 120) >> 1, (e + 120) >> 1,    \
        (e + 120) >> 1
static const uint8_t LOWER_BYTES[128] = {
    0, 0, 128, 192, 0, 32, 64, 96, LOWER(1), LOWER(2), LOWER(3), LOWER(4), LOWER(5), LOWER(6), LOWER(7), LOWER(8), LOWER(9),
    LOWER(10), LOWER(11), LOWER(12), LOWER(13), LOWER(14), 128, 144, 160, 176, 192, 208, 224, 192};
static const uint8_t UPPER_BYTES[128] = {
    0, 59, 59, 59, 60, 60, 60, 60, UPPER(1), UPPER(2), UPPER(3), UPPER(4), UPPER(5), UPPER(6), UPPER(7), UPPER(8), UPPER(9),
    UPPER(10), UPPER(11), UPPER(12), UPPER(13), UPPER(14), 67, 67, 67, 67, 67, 67, 67, 127};
#undef LOWER
#undef UPPER

struct bytes {
    __m512i lower, other_lower, upper, other_upper;
};

static INLINE struct bytes byte_tables(void)
{
    return (struct bytes){_mm512_loadu_si512(LOWER_BYTES), _mm512_loadu_si512(LOWER_BYTES + 64), _mm512_loadu_si512(UPPER_BYTES),
                          _mm512_loadu_si512(UPPER_BYTES + 64)};
}

static INLINE __m512i lower_bytes(struct bytes t, __m512i codes)
{
    return _mm512_permutex2var_epi8(t.lower, codes, t.other_lower);
}

static INLINE __m512i upper_bytes(struct bytes t, __m512i codes)
{
    const __m512i sign = _mm512_and_si512(codes, _mm512_set1_epi8(-128));
    return _mm512_or_si512(_mm512_permutex2var_epi8(t.upper, codes, t.other_upper), sign);
}

/* `lines` rows of weights from row n on times `rows` rows of x, laid out by `in_eights` -> y[line * rows + row]. */
static INLINE void dots_eight(const struct matrix *m, long n, const int lines, const uint16_t *const *x, const int rows,
                              float *y)
{
    const long shared = shared_columns(m), size = size_of(m->coding.dtype);
    const char *w = m->weights + n * m->columns;
    const struct bytes tables = byte_tables();
#define BEGIN(i) __m512 sum##i = _mm512_setzero_ps();
#define EMPTY(i) __m512 part##i = _mm512_setzero_ps();
#define SCALES(line) const char *scales##line = line < lines ? row_scales(m, n + line) : NULL;
#define READ(line)                                                                                                     \
    const __m512i codes##line = line < lines ? _mm512_maskz_loadu_epi8(bytes, w + line * m->columns + k) : _mm512_setzero_si512(); \
    const __m512i lower##line = lower_bytes(tables, codes##line), upper##line = upper_bytes(tables, codes##line);
#define FIRST(line) const __m512i weights##line = _mm512_unpacklo_epi8(lower##line, upper##line);
#define SECOND(line) const __m512i others##line = _mm512_unpackhi_epi8(lower##line, upper##line);
#define OF(name, at)                                                                                                   \
    ((at) == 0   ? name##0                                                                                             \
     : (at) == 1 ? name##1                                                                                             \
     : (at) == 2 ? name##2                                                                                             \
     : (at) == 3 ? name##3                                                                                             \
     : (at) == 4 ? name##4                                                                                             \
     : (at) == 5 ? name##5                                                                                             \
     : (at) == 6 ? name##6                                                                                             \
                 : name##7)
#define INPUT(row)                                                                                                     \
    const __m512i inputs##row = row < rows ? _mm512_loadu_si512(x[row % rows] + k) : _mm512_setzero_si512();           \
    const __m512i beside##row = row < rows ? _mm512_loadu_si512(x[row % rows] + k + PAIRED) : _mm512_setzero_si512();
#define ADD(i)                                                                                                         \
    if (i < lines * rows)                                                                                              \
        part##i = _mm512_dpbf16_ps(part##i, (__m512bh)OF(weights, i / rows), (__m512bh)OF(inputs, i % rows));
#define ADD_OTHERS(i)                                                                                                  \
    if (i < lines * rows)                                                                                              \
        part##i = _mm512_dpbf16_ps(part##i, (__m512bh)OF(others, i / rows), (__m512bh)OF(beside, i % rows));
#define SCALE(i)                                                                                                       \
    if (i < lines * rows)                                                                                              \
        sum##i = _mm512_fmadd_ps(part##i, _mm512_set1_ps(stored_scale(OF(scales, i / rows) + at, m->coding.dtype)), sum##i);
    OF_EIGHT(BEGIN)
    OF_EIGHT(SCALES)
    for (long block = 0, at = 0; block < m->columns; block += shared, at += size) {
        const long end = block + shared < m->columns ? block + shared : m->columns;
        OF_EIGHT(EMPTY)
        for (long k = block; k < end; k += STRETCH) {
            const __mmask64 bytes = end - k >= STRETCH ? ~0ull : (1ull << (end - k)) - 1;
            for (int line = 0; line < lines; line++)
                __builtin_prefetch(w + line * m->columns + k + AHEAD, 0, 1);
            OF_EIGHT(READ)
            OF_EIGHT(FIRST)
            OF_EIGHT(SECOND)
            OF_EIGHT(INPUT)
            OF_EIGHT(ADD)
            OF_EIGHT(ADD_OTHERS)
        }
        OF_EIGHT(SCALE)
    }
    if (lines * rows == 1)
        *y = sum_v4((floats_v4)sum0);
    else
        sum_eight(sum0, sum1, sum2, sum3, sum4, sum5, sum6, sum7, y);
#undef BEGIN
#undef EMPTY
#undef SCALES
#undef READ
#undef FIRST
#undef SECOND
#undef OF
#undef INPUT
#undef ADD
#undef ADD_OTHERS
#undef SCALE
}

#define DOTS(lines, rows)                                                                                              \
    static __attribute__((noinline)) void eight_##lines##_##rows(const struct matrix *m, long n, const uint16_t *const *x, \
                                                                 float *y)                                             \
    {                                                                                                                  \
        dots_eight(m, n, lines, x, rows, y);                                                                           \
    }
DOTS(1, 1) DOTS(1, 2) DOTS(1, 3) DOTS(1, 4) DOTS(4, 1) DOTS(8, 1) DOTS(4, 2) DOTS(2, 3) DOTS(2, 4)
#undef DOTS
