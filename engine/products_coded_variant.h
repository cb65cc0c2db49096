/* Quantised weights unpacked, for one instruction set; included after products_convert_variant.h. */

#if LANES == 16 /* AVX-512: sixteen bytes are thirty-two indices into a table of thirty-two words */
static INLINE __m512i NAME(codes)(const char *from)
{
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
    return _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)); /* the fifth bit finds the same again */
}

static INLINE __m512i NAME(table)(const uint16_t *table)
{
    const __m256i half = _mm256_loadu_si256((const __m256i *)table);
    return _mm512_inserti64x4(_mm512_castsi256_si512(half), half, 1);
}

static INLINE void NAME(group)(const char *from, int exponent, uint16_t *to)
{
    const __m512i table = NAME(table)(FOURS), power = _mm512_set1_epi16((short)((exponent - BIAS) << 7));
    const __m512i scaled = _mm512_mask_add_epi16(table, 0xfefefefe, table, power);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(NAME(codes)(from), scaled));
}
#elif LANES == 8 /* AVX2: words are put together of their upper and lower bytes, looked up in sixteen of each */
static INLINE void NAME(group)(const char *from, int exponent, uint16_t *to)
{
    const __m128i upper = _mm_setr_epi8(0, 0x3f, 0x3f, 0x3f, 0x40, 0x40, 0x40, 0x40, -128, -65, -65, -65, -64, -64, -64, -64);
    const __m128i lower = _mm_setr_epi8(0, 0, -128, -64, 0, 64, -128, -64, 0, 0, -128, -64, 0, 64, -128, -64);
    const __m128i bytes = _mm_loadu_si128((const __m128i *)from), nibble = _mm_set1_epi8(15), zero = _mm_setzero_si128();
    const __m128i even = _mm_and_si128(bytes, nibble), odd = _mm_and_si128(_mm_srli_epi16(bytes, 4), nibble);
    const __m128i codes[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
    const __m128i power = _mm_set1_epi16((short)((exponent - BIAS) << 7));
    for (int half = 0; half < 2; half++) {
        const __m128i low = _mm_shuffle_epi8(lower, codes[half]), high = _mm_shuffle_epi8(upper, codes[half]);
        const __m128i words[2] = {_mm_unpacklo_epi8(low, high), _mm_unpackhi_epi8(low, high)};
        for (int part = 0; part < 2; part++) {
            const __m128i nothing = _mm_cmpeq_epi16(_mm_slli_epi16(words[part], 1), zero);
            _mm_storeu_si128((__m128i *)(to + half * 16 + part * 8),
                             _mm_add_epi16(words[part], _mm_andnot_si128(nothing, power)));
        }
    }
}
#else
static INLINE void NAME(group)(const char *from, int exponent, uint16_t *to)
{
    const uint16_t power = (uint16_t)((exponent - BIAS) << 7);
    for (int i = 0; i < GROUP; i++) {
        const int code = (uint8_t)from[i / 2] >> i % 2 * 4 & 15;
        to[i] = code & 7 ? FOURS[code] + power : FOURS[code];
    }
}
#endif

static INLINE void NAME(row_of_floats)(const char *from, const uint8_t *exponents, int dtype, long columns, char *to)
{
    for (long k = 0; k < columns; k += GROUP, from += GROUP / 2, exponents++) {
        uint16_t held[GROUP], *words = dtype == FLOAT32 ? held : (uint16_t *)to + k;
        if (is_usual(*exponents))
            NAME(group)(from, *exponents, words);
        else
            unusual_group(from, *exponents, words);
        for (int i = 0; dtype == FLOAT32 && i < GROUP; i++)
            ((float *)to)[k + i] = number((const char *)(held + i), BFLOAT16);
    }
}

/* GROUP integers times their scale, rounded once. */
static INLINE void NAME(integers_of)(const char *from, float scale, const int dtype, char *to)
{
    NAME(floats) v;
#if LANES == 16
    uint16_t held[GROUP];
    _mm512_storeu_si512(held, _mm512_permutexvar_epi16(NAME(codes)(from), NAME(table)(INTEGERS)));
    for (int i = 0; i < GROUP; i += LANES) {
        v = NAME(weights)((const char *)(held + i), BFLOAT16) * scale;
        NAME(give)(v, to + i * size_of(dtype), dtype, LANES, 1);
    }
#else
    for (int i = 0; i < GROUP; i += LANES) {
        float held[LANES];
        for (int lane = 0; lane < LANES; lane++)
            held[lane] = ((uint8_t)from[(i + lane) / 2] >> lane % 2 * 4 & 15) - 8;
        v = NAME(load)(held) * scale;
        NAME(give)(v, to + i * size_of(dtype), dtype, LANES, 1);
    }
#endif
}

static INLINE void NAME(row_of_integers)(const struct matrix *m, const char *from, const char *scales, const int dtype, char *to)
{
    const long wide = shared_columns(m), size = size_of(m->coding.dtype);
    for (long k = 0; k < m->columns; scales += size) {
        const float scale = stored_scale(scales, m->coding.dtype);
        for (const long end = k + wide; k < end; k += GROUP)
            NAME(integers_of)(from + k / 2, scale, dtype, to + k * size_of(dtype));
    }
}

static INLINE void NAME(row_of_eights)(const struct matrix *m, const char *from, const char *scales, const int dtype, char *to)
{
    const long wide = shared_columns(m), size = size_of(m->coding.dtype);
    for (long k = 0; k < m->columns; k += wide, scales += size) {
        const float scale = stored_scale(scales, m->coding.dtype);
        const long end = k + wide < m->columns ? k + wide : m->columns;
        NAME(some)(FLOAT8, dtype, 1, from, to, k, end, &scale);
    }
}

/* Rows n to n + count of a quantised matrix -> to [count, columns] of `dtype`. */
static void NAME(unpack)(const struct matrix *m, int dtype, long n, long count, char *to)
{
    const long step = coded_row(m), line = m->columns * size_of(dtype);
    const char *from = m->weights + n * step;
    for (const long end = n + count; n < end; n++, from += step, to += line) {
        const char *scales = row_scales(m, n);
        if (m->coding.way == MXFP4)
            NAME(row_of_floats)(from, (const uint8_t *)scales, dtype, m->columns, to);
        else if (m->coding.way == INT4 && dtype == FLOAT32)
            NAME(row_of_integers)(m, from, scales, FLOAT32, to);
        else if (m->coding.way == INT4)
            NAME(row_of_integers)(m, from, scales, BFLOAT16, to);
        else if (dtype == FLOAT32)
            NAME(row_of_eights)(m, from, scales, FLOAT32, to);
        else
            NAME(row_of_eights)(m, from, scales, BFLOAT16, to);
    }
}
