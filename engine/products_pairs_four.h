/* Products of weights in four bits with few rows of bfloat16, where the processor multiplies pairs of it itself; included
 * after products_pairs.h. Sixty-four bytes are four times thirty-two codes, each found by shifting the words: a vector of
 * the numbers 4 j + v of SPAN for each v. Inputs are laid out so once, then nothing is moved. What four groups make is
 * multiplied with their powers of two, four lanes each, and added up.
 *
 * A dot product is summed in one order, however many rows and weights are computed beside it: a row never depends on its
 * batch.
 */

#define SPAN 128             /* numbers of a row that are computed together: four groups */
#define SPANS(columns) (((columns) + SPAN - 1) / SPAN)
#define FOUR_ROWS 4          /* of inputs that share what is unpacked */
#define FOUR_PANEL (1 << 16) /* bytes of weights that stay in the second cache while all rows pass */

/* One row [columns] -> [SPANS][4][PAIRED], zeros behind its end. */
static void in_fours(const uint16_t *x, long columns, uint16_t *to)
{
    for (long k = 0; k < SPANS(columns) * SPAN; k += PAIRED, to += k % SPAN ? PAIRED / 4 : SPAN - 3 * PAIRED / 4) {
        const __m512i here = _mm512_maskz_loadu_epi16(left_of(columns - k), x + k);
        _mm_storeu_si128((__m128i *)to, _mm512_cvtepi64_epi16(here));
        _mm_storeu_si128((__m128i *)(to + PAIRED), _mm512_cvtepi64_epi16(_mm512_srli_epi64(here, 16)));
        _mm_storeu_si128((__m128i *)(to + 2 * PAIRED), _mm512_cvtepi64_epi16(_mm512_srli_epi64(here, 32)));
        _mm_storeu_si128((__m128i *)(to + 3 * PAIRED), _mm512_cvtepi64_epi16(_mm512_srli_epi64(here, 48)));
    }
}

/* The powers of two of four groups, four lanes each; none where their bytes are 0. */
static INLINE __m512 powers_of(int exponents)
{
    const __m512i places = _mm512_set_epi32(0x03ffffff, 0x03ffffff, 0x03ffffff, 0x03ffffff, 0x02ffffff, 0x02ffffff, 0x02ffffff,
                                            0x02ffffff, 0x01ffffff, 0x01ffffff, 0x01ffffff, 0x01ffffff, 0x00ffffff, 0x00ffffff,
                                            0x00ffffff, 0x00ffffff);
    return _mm512_castsi512_ps(_mm512_srli_epi32(_mm512_shuffle_epi8(_mm512_set1_epi32(exponents), places), 1));
}

static INLINE int four_of(const uint8_t *exponents, long some)
{
    int four = 0;
    memcpy(&four, exponents, some == 4 ? 4 : some);
    return four;
}

/* `lines` rows of weights from `w` and `exponents` on times `rows` rows of x, laid out by `in_fours` -> y[line * rows + row]. */
static INLINE void dots_four(const struct matrix *m, long n, const int lines, const uint16_t *const *x, const int rows,
                             float *y)
{
    const long step = m->columns / 2, groups = m->columns / GROUP;
    const char *w = m->weights + n * step;
    const uint8_t *exponents = (const uint8_t *)m->scales + n * groups;
    const __m256i table = _mm256_loadu_si256((const __m256i *)FOURS);
    const __m512i values = _mm512_inserti64x4(_mm512_castsi256_si512(table), table, 1);
#define BEGIN(i) __m512 sum##i = _mm512_setzero_ps();
#define EMPTY(i) __m512 part##i = _mm512_setzero_ps();
#define READ(line)                                                                                                     \
    const __m512i codes##line = line < lines ? _mm512_maskz_loadu_epi8(bytes, w + line * step + span * SPAN / 2)        \
                                             : _mm512_setzero_si512();
#define UNPACK(line) /* the fifth bit finds the same again */                                                          \
    const __m512i weights##line = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes##line, shift), values);
#define OF(name, at)                                                                                                   \
    ((at) == 0   ? name##0                                                                                             \
     : (at) == 1 ? name##1                                                                                             \
     : (at) == 2 ? name##2                                                                                             \
     : (at) == 3 ? name##3                                                                                             \
     : (at) == 4 ? name##4                                                                                             \
     : (at) == 5 ? name##5                                                                                             \
     : (at) == 6 ? name##6                                                                                             \
                 : name##7)
#define ADD(i)                                                                                                         \
    if (i < lines * rows)                                                                                              \
        part##i = _mm512_dpbf16_ps(part##i, (__m512bh)OF(weights, i / rows), (__m512bh)OF(inputs, i % rows));
#define INPUT(row) const __m512i inputs##row = row < rows ? _mm512_loadu_si512(x[row % rows] + at) : _mm512_setzero_si512();
#define POWERS(line) const __m512 powers##line = powers_of(line < lines ? four_of(exponents + line * groups + span * 4, some) : 0);
#define SCALE(i)                                                                                                       \
    if (i < lines * rows)                                                                                              \
        sum##i = _mm512_fmadd_ps(part##i, OF(powers, i / rows), sum##i);
    OF_EIGHT(BEGIN)
    const long whole = m->columns / SPAN, left = groups % 4;
    for (long span = 0; span < whole + (left > 0); span++) {
        const long some = span < whole ? 4 : left;
        const __mmask64 bytes = some == 4 ? ~0ull : (1ull << some * GROUP / 2) - 1;
        OF_EIGHT(EMPTY)
        OF_EIGHT(READ)
#pragma GCC unroll 4
        for (int shift = 0; shift < 16; shift += 4) { /* an input is read once for all lines */
            const long at = span * SPAN + shift / 4 * PAIRED;
            OF_EIGHT(UNPACK)
            OF_EIGHT(INPUT)
            OF_EIGHT(ADD)
        }
        for (int line = 0; line < lines; line++)
            __builtin_prefetch(w + line * step + span * SPAN / 2 + AHEAD, 0, 1);
        OF_EIGHT(POWERS)
        OF_EIGHT(SCALE)
    }
    if (lines * rows == 1)
        *y = sum_v4((floats_v4)sum0);
    else
        sum_eight(sum0, sum1, sum2, sum3, sum4, sum5, sum6, sum7, y);
#undef BEGIN
#undef EMPTY
#undef READ
#undef UNPACK
#undef OF
#undef ADD
#undef INPUT
#undef POWERS
#undef SCALE
}

typedef void (*dots_four_t)(const struct matrix *, long, const uint16_t *const *, float *);

#define DOTS(lines, rows)                                                                                              \
    static __attribute__((noinline)) void four_##lines##_##rows(const struct matrix *m, long n, const uint16_t *const *x, \
                                                                float *y)                                              \
    {                                                                                                                  \
        dots_four(m, n, lines, x, rows, y);                                                                            \
    }
DOTS(1, 1) DOTS(1, 2) DOTS(1, 3) DOTS(1, 4) DOTS(4, 1) DOTS(8, 1) DOTS(4, 2) DOTS(2, 3) DOTS(2, 4)
#undef DOTS

/* Rows `first` to `last` of the weights times at most FOUR_ROWS rows of x, laid out by `in_fours`. */
static void lines_four(const struct matrix *m, const uint16_t *const *x, long rows, float *const *y, long first, long last)
{
    static const dots_four_t alone[FOUR_ROWS] = {four_1_1, four_1_2, four_1_3, four_1_4};
    static const dots_four_t beside[FOUR_ROWS] = {four_4_1, four_4_2, four_2_3, four_2_4};
    const int many = rows == 1 && m->columns <= SHORT; /* of short lines the most takes what is done once for each */
    const long most = many ? 8 : rows <= 2 ? 4 : 2;
    for (long lines; first < last; first += lines) {
        float found[2 * TOGETHER];
        lines = last - first < most ? 1 : most;
        for (long line = 0; line < lines; line += 2)
            __builtin_prefetch(m->scales + (first + line) * (m->columns / GROUP) + AHEAD / 16, 0, 1);
        (lines == 1 ? alone[rows - 1] : many ? four_8_1 : beside[rows - 1])(m, first, x, found);
        for (long line = 0; line < lines; line++) {
            const float bias = m->bias ? number(m->bias + (first + line) * 2, BFLOAT16) : 0;
            for (long row = 0; row < rows; row++)
                y[row][first + line] = m->bias ? found[line * rows + row] + bias : found[line * rows + row];
        }
    }
}

static void multiply_pairs_four(const struct matrix *m, const uint16_t *const *x, long rows, float *const *y, long first,
                                long last)
{
    char room[FOUR_ROWS * WIDEST + LINE];
    const long width = SPANS(m->columns) * SPAN, panel = FOUR_PANEL / m->columns * 2 / 8 * 8 + 8;
    uint16_t *laid_out = (uint16_t *)aligned((float *)room);
    for (long begin = first; first < last; first += panel)
        for (long row = 0; row < rows; row += FOUR_ROWS) {
            const long some = rows - row < FOUR_ROWS ? rows - row : FOUR_ROWS;
            const uint16_t *inputs[FOUR_ROWS];
            for (long r = 0; r < some; r++) {
                inputs[r] = laid_out + r * width;
                if (first == begin || rows > FOUR_ROWS) /* else they are there */
                    in_fours(x[row + r], m->columns, laid_out + r * width);
            }
            lines_four(m, inputs, some, y + row, first, first + panel < last ? first + panel : last);
        }
}
