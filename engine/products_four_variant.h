/* Four-bit weights unpacked, for one instruction set; included before products_variant.h. */

#if LANES == 16 /* AVX-512: sixteen bytes are thirty-two indices into a table of thirty-two words */
static INLINE void NAME(group)(const char *from, int exponent, uint16_t *to)
{
    const __m256i table = _mm256_loadu_si256((const __m256i *)FOURS);
    const __m512i twice = _mm512_inserti64x4(_mm512_castsi256_si512(table), table, 1);
    const __m512i scaled = _mm512_mask_add_epi16(twice, 0xfefefefe, twice, _mm512_set1_epi16((short)((exponent - BIAS) << 7)));
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)from));
    const __m512i codes = _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)); /* the fifth bit finds the same again */
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(codes, scaled));
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

/* Rows n to n + count of a matrix in four bits -> to [count, columns] of `dtype`. */
static void NAME(unpack)(const struct matrix *m, int dtype, long n, long count, char *to)
{
    const long groups = m->columns / GROUP;
    const char *from = m->weights + n * groups * (GROUP / 2);
    const uint8_t *exponents = (const uint8_t *)m->scales + n * groups;
    for (long group = 0; group < count * groups; group++, from += GROUP / 2) {
        uint16_t held[GROUP], *words = dtype == FLOAT32 ? held : (uint16_t *)to + group * GROUP;
        if (is_usual(exponents[group]))
            NAME(group)(from, exponents[group], words);
        else
            unusual_group(from, exponents[group], words);
        for (int i = 0; dtype == FLOAT32 && i < GROUP; i++)
            ((float *)to)[group * GROUP + i] = number((const char *)(held + i), BFLOAT16);
    }
}
