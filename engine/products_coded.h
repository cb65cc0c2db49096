/* Quantised weights: numbers of four or eight bits, and scales that some of them share (store/quantised.py). They are
 * unpacked into the serving dtype a few rows at a time, which stay in the first cache, and multiplied as any others: sums
 * are those of the unpacked weights, to the bit. From memory comes a quarter or half of the bytes.
 */

#define GROUP 32         /* four-bit weights that are unpacked together; scales are for so many or a multiple of it */
#define BIAS 127         /* of the exponents of MXFP4 */
#define NO_NUMBER 255    /* in place of one */
#define TILE (1 << 14)   /* bytes of unpacked weights that are multiplied at a time */
#define WIDEST (1 << 16) /* bytes of one row, unpacked */

typedef void (*unpack_t)(const struct matrix *, int, long, long, char *);
typedef void (*multiply_t)(const struct matrix *, int, const float *const *, long, float *const *, long, long);

/* What each of sixteen codes is in bfloat16: floats, whose exponents an integer can be added to, and integers. */
static const uint16_t FOURS[16] = {0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0,
                                   0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};
static const uint16_t INTEGERS[16] = {0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80,
                                      0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};

/* Bytes of one row of numbers. */
static INLINE long coded_row(const struct matrix *m)
{
    return m->coding.way == FP8 ? m->columns : m->columns / 2;
}

/* Weights of a row that share a scale. */
static INLINE long shared_columns(const struct matrix *m)
{
    return m->coding.columns ? m->coding.columns : m->columns;
}

/* The scales of row n. Parts of the matrix have blocks of rows of their own, from their first row on. */
static INLINE const char *row_scales(const struct matrix *m, long n)
{
    const long wide = shared_columns(m), blocks = (m->columns + wide - 1) / wide, tall = m->coding.rows;
    if (tall > 1)
        n = n / m->part * ((m->part + tall - 1) / tall) + n % m->part / tall;
    return m->scales + n * blocks * size_of(m->coding.dtype);
}

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

/* Rows `first` to `last` of a quantised matrix times `rows` rows of x, as `multiply` does it of others. */
static void multiply_coded(unpack_t unpack, multiply_t multiply, const struct matrix *m, int dtype, const float *const *x,
                           long rows, float *const *y, long first, long last)
{
    char room[WIDEST + LINE];
    char *tile = (char *)aligned((float *)room);
    const long line = m->columns * (dtype == FLOAT32 ? 4 : 2), step = line * 8 <= TILE ? TILE / line / 8 * 8 : line < TILE ? TILE / line : 1;
    for (; first < last; first += step) {
        const long some = last - first < step ? last - first : step;
        unpack(m, dtype, first, some, tile);
        const struct matrix plain = {.weights = (const char *)((uintptr_t)tile - first * line), .bias = m->bias,
                                     .rows = m->rows, .columns = m->columns, .stride = m->columns};
        multiply(&plain, dtype, x, rows, y, first, first + some);
    }
}
