/* Weights in four bits as MXFP4 stores them: two numbers of one sign, two exponent bits and one of fraction in a byte, the
 * first in its lower half, and a power of two for every GROUP of a row. They are unpacked into bfloat16 (or floats), which
 * holds them exactly, a few rows at a time that stay in the first cache, and multiplied as any others: sums are those of
 * the unpacked weights, to the bit. From memory comes a quarter of the bytes.
 */

#define GROUP 32         /* weights that share a power of two */
#define BIAS 127         /* of its exponent */
#define NO_NUMBER 255    /* in place of an exponent */
#define TILE (1 << 14)   /* bytes of unpacked weights that are multiplied at a time */
#define WIDEST (1 << 16) /* bytes of one row, unpacked */

typedef void (*unpack_t)(const struct matrix *, int, long, long, char *);
typedef void (*multiply_t)(const struct matrix *, int, const float *const *, long, float *const *, long, long);

/* What each of sixteen codes is in bfloat16, whose exponents an integer can be added to. */
static const uint16_t FOURS[16] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
                                   0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};

/* Whether no exponent leaves its range where this is added: it is least for 0.5 and most for 6. */
static INLINE int is_usual(int exponent)
{
    return exponent > 1 && exponent < 2 * BIAS - 2;
}

static void unusual_group(const char *from, int exponent, uint16_t *to)
{
    for (int i = 0; i < GROUP; i++) {
        const float value = number((const char *)&FOURS[(uint8_t)from[i / 2] >> i % 2 * 4 & 15], BFLOAT16);
        put((char *)(to + i), exponent == NO_NUMBER ? NAN : ldexpf(value, exponent - BIAS), BFLOAT16);
    }
}

/* Rows `first` to `last` of a matrix in four bits times `rows` rows of x, as `multiply` does it of others. */
static void multiply_four(unpack_t unpack, multiply_t multiply, const struct matrix *m, int dtype, const float *const *x,
                          long rows, float *const *y, long first, long last)
{
    char room[WIDEST + LINE];
    char *tile = (char *)aligned((float *)room);
    const long line = m->columns * (dtype == FLOAT32 ? 4 : 2), step = line * 8 <= TILE ? TILE / line / 8 * 8 : line < TILE ? TILE / line : 1;
    for (; first < last; first += step) {
        const long some = last - first < step ? last - first : step;
        unpack(m, dtype, first, some, tile);
        const struct matrix plain = {(const char *)((uintptr_t)tile - first * line), m->bias, m->rows, m->columns, m->columns};
        multiply(&plain, dtype, x, rows, y, first, first + some);
    }
}
