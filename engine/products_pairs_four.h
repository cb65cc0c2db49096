/* Dot products of weights in four bits with few rows of bfloat16; included by products_pairs_coded.h. Sixty-four bytes are four times thirty-two codes, each found by shifting the words: a vector of
 * the numbers 4 j + v of SPAN for each v. Inputs are laid out so once, then nothing is moved. What four groups make is
 * multiplied with their scales, four lanes each, and added up.
 *
 * A dot product is summed in one order, however many rows and weights are computed beside it: a row never depends on its
 * batch.
 */

#define SPAN 128 /* numbers of a row that are computed together: four groups */
#define SPANS(columns) (((columns) + SPAN - 1) / SPAN)

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

/* Which of the words of eight bytes become floats of four lanes each, where a scale is for so many columns. */
static INLINE __m512i places_of(long shared)
{
    const int apart = shared == GROUP ? 2 : 0, behind = shared == GROUP ? 4 : shared < SPAN ? 2 : 0; /* bytes to the next and the third word */
    const int word[4] = {0, apart, behind, apart + behind};
    __m512i places = _mm512_setzero_si512();
    for (int four = 0; four < 4; four++) {
        const int place = (word[four] + 1) << 24 | word[four] << 16 | 0x8080;
        places = _mm512_mask_set1_epi32(places, 0xf << 4 * four, place);
    }
    return places;
}

/* The scales, in bfloat16, of the `some` groups that begin at column `first`. */
static INLINE __m512 scales_of_span(const char *scales, long first, long shared, long some, __m512i places)
{
    uint64_t held = 0;
    if (shared >= SPAN)
        memcpy(&held, scales + (shared == SPAN ? first / SPAN : first / shared) * 2, 2);
    else if (shared == GROUP && some == 4)
        memcpy(&held, scales + first / GROUP * 2, 8);
    else if (shared == GROUP)
        memcpy(&held, scales + first / GROUP * 2, 2 * some);
    else
        memcpy(&held, scales + first / (2 * GROUP) * 2, some > 2 ? 4 : 2);
    return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_set1_epi64((long long)held), places));
}

/* `lines` rows of weights from row n on times `rows` rows of x, laid out by `in_fours` -> y[line * rows + row]. */
static INLINE void dots_four(const struct matrix *m, long n, const int lines, const uint16_t *const *x, const int rows,
                             const int way, float *y)
{
    const long step = m->columns / 2, groups = m->columns / GROUP, shared = shared_columns(m);
    const char *w = m->weights + n * step, *scales = row_scales(m, n);
    const long scales_step = m->columns / shared * (way == INT4 ? 2 : 1);
    const __m512i places = way == INT4 ? places_of(shared) : _mm512_setzero_si512();
    const __m512i values = table_v4(way == INT4 ? INTEGERS : FOURS);
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
#define POWERS(line)                                                                                                   \
    const __m512 powers##line =                                                                                        \
        line >= lines ? _mm512_setzero_ps()                                                                            \
        : way == INT4 ? scales_of_span(scales + line * scales_step, span * SPAN, shared, some, places)                 \
                      : powers_of(four_of((const uint8_t *)scales + line * scales_step + span * 4, some));
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

