/* Products of bfloat16 weights with many rows, after products_pairs.h: where that reads the weights once and dots them with a
 * few rows, here rows lie across the lanes, [columns / 2, vectors]. A lane holds two neighbouring columns of one row; one
 * instruction multiplies both with a pair of weights, which is spread over a vector of rows, and adds them up. No sum is ever
 * taken across lanes.
 *
 * A number is summed over the pairs of columns in their order, in its own lane: a row never depends on its batch.
 */

#define PAIR_LANES 16
#define PAIR_VECTORS 4
#define MOST_ROWS 16
#define WIDE (PAIR_LANES * PAIR_VECTORS) /* rows of x that share one reading of the weights */
#define TALL_PANEL 96 /* rows of weights that stay in the second cache while all rows of x pass */

/* Sixteen rows of sixteen 32-bit numbers, transposed in place. */
static INLINE void transpose(__m512i *r)
{
    __m512i t[PAIR_LANES];
#pragma GCC unroll 8
    for (int i = 0; i < PAIR_LANES; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < PAIR_LANES; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512i even = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), odd = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
        const __m512i even2 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        const __m512i odd2 = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
        t[i] = _mm512_shuffle_i32x4(even, even2, 0x88);
        t[8 + i] = _mm512_shuffle_i32x4(even, even2, 0xdd);
        t[4 + i] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < PAIR_LANES; i++)
        r[i] = t[i];
}

/* `columns` columns of `width` numbers from `from` on, `column` bytes apart, -> [width, room], room for whole vectors; zeros
 * behind them up to one. */
static void turn_over(const char *from, long column, long columns, long width, long room, char *to)
{
    for (long c = 0; c < columns; c += 2 * PAIR_LANES) /* a pair of columns is one 32-bit number, of one d */
        for (long d = 0; d < width; d += PAIR_LANES) {
            const __mmask16 left = width - d < PAIR_LANES ? (1u << (width - d)) - 1 : 0xffff;
            __m512i r[PAIR_LANES];
#pragma GCC unroll 16
            for (int i = 0; i < PAIR_LANES; i++) {
                const char *one = from + (c + 2 * i) * column + 2 * d;
                const __m256i nothing = _mm256_setzero_si256();
                const __m256i low = c + 2 * i < columns ? _mm256_maskz_loadu_epi16(left, one) : nothing;
                const __m256i high = c + 2 * i + 1 < columns ? _mm256_maskz_loadu_epi16(left, one + column) : nothing;
                r[i] = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
            }
            transpose(r);
            for (long i = 0; i < PAIR_LANES && d + i < width; i++)
                _mm512_storeu_si512(to + ((d + i) * room + c) * 2, r[i]);
        }
}

/* `rows` rows of weights, `step` bytes apart, times x [pairs, vectors] -> y [rows, vectors], f32. */
static INLINE void spread_pairs(const char *w, const int rows, long step, const char *x, const int vectors, long pairs,
                                float *y)
{
    __m512 sums[MOST_ROWS][PAIR_VECTORS];
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++)
            sums[row][v] = _mm512_setzero_ps();
    for (long k = 0; k < pairs; k++) {
        __m512i here[PAIR_VECTORS];
        if (k % PAIR_LANES == 0)
            for (int row = 0; row < rows; row++)
                __builtin_prefetch(w + (rows + row) * step + 4 * k, 0, 1); /* those that are next */
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++)
            here[v] = _mm512_loadu_si512(x + (k * vectors + v) * LINE);
#pragma GCC unroll 16
        for (int row = 0; row < rows; row++) {
            int pair;
            memcpy(&pair, w + row * step + 4 * k, 4);
            const __m512i weights = _mm512_set1_epi32(pair);
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++)
                sums[row][v] = _mm512_dpbf16_ps(sums[row][v], (__m512bh)here[v], (__m512bh)weights);
        }
    }
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++)
            _mm512_storeu_ps(y + (row * vectors + v) * PAIR_LANES, sums[row][v]);
}

/* Some rows of weights in bfloat16; those that are quantised are unpacked into `room`. */
static INLINE const char *rows_of(const struct matrix *m, long n, long count, char *room)
{
    if (!m->scales)
        return m->weights + n * m->stride * 2;
    unpack_pairs(m, BFLOAT16, n, count, room);
    return room;
}

/* x [m->columns / 2, vectors] -> y [m->rows, vectors], of a matrix that does not lie across; `room` [16, m->columns] bfloat16
 * for one that is quantised. */
static INLINE void through_pairs(const struct matrix *m, const char *x, const int vectors, float *y, char *room)
{
    const long step = m->stride * 2, lanes = vectors * PAIR_LANES;
    const int most = vectors == 1 ? 16 : 24 / vectors; /* rows of weights at a time: their sums fill the registers */
    long n = 0;
    for (; n + most <= m->rows; n += most)
        spread_pairs(rows_of(m, n, most, room), most, step, x, vectors, m->columns / 2, y + n * lanes);
    for (; n + 4 <= m->rows; n += 4)
        spread_pairs(rows_of(m, n, 4, room), 4, step, x, vectors, m->columns / 2, y + n * lanes);
    for (; n < m->rows; n++)
        spread_pairs(rows_of(m, n, 1, room), 1, step, x, vectors, m->columns / 2, y + n * lanes);
    for (n = 0; m->bias && n < m->rows; n++)
        for (long lane = 0; lane < lanes; lane++)
            y[n * lanes + lane] += number(m->bias + 2 * n, BFLOAT16);
}

static INLINE int vectors_for(long rows)
{
    return (int)((rows + PAIR_LANES - 1) / PAIR_LANES);
}

/* `count` rows of bfloat16, at most WIDE -> [pairs, vectors], with zeros where there is no row. */
static INLINE void pack_rows(const char *const *rows, long count, long pairs, char *to)
{
    const int vectors = vectors_for(count);
    for (long k = 0; k < pairs; k += PAIR_LANES) {
        const long some = pairs - k < PAIR_LANES ? pairs - k : PAIR_LANES;
        const __mmask16 left = 0xffff >> (PAIR_LANES - some);
        for (int v = 0; v < vectors; v++) {
            __m512i r[PAIR_LANES];
#pragma GCC unroll 16
            for (int i = 0; i < PAIR_LANES; i++)
                r[i] = v * PAIR_LANES + i < count ? _mm512_maskz_loadu_epi32(left, rows[v * PAIR_LANES + i] + 4 * k)
                                                  : _mm512_setzero_si512();
            transpose(r);
            for (long i = 0; i < some; i++)
                _mm512_storeu_si512(to + ((k + i) * vectors + v) * LINE, r[i]);
        }
    }
}

/* Sixteen floats to `to` in `dtype`, those of `left`. */
static INLINE void put_sixteen(char *to, __m512i floats, __mmask16 left, const int dtype)
{
    if (dtype == FLOAT32)
        _mm512_mask_storeu_epi32(to, left, floats);
    else
        _mm256_mask_storeu_epi16(to, left, (__m256i)_mm512_cvtneps_pbh((__m512)floats));
}

/* from f32 [numbers, vectors] -> the `count` rows of `to`, each number in `dtype`. */
static INLINE void unpack_rows(const float *from, long numbers, long count, const int dtype, char *const *to)
{
    const int vectors = vectors_for(count);
    const long size = dtype == FLOAT32 ? 4 : 2;
    for (long n = 0; n < numbers; n += PAIR_LANES) {
        const long some = numbers - n < PAIR_LANES ? numbers - n : PAIR_LANES;
        const __mmask16 left = 0xffff >> (PAIR_LANES - some);
        for (int v = 0; v < vectors; v++) {
            const long rows = count - v * PAIR_LANES < PAIR_LANES ? count - v * PAIR_LANES : PAIR_LANES;
            __m512i r[PAIR_LANES];
#pragma GCC unroll 16
            for (int i = 0; i < PAIR_LANES; i++)
                r[i] = i < some ? _mm512_loadu_si512(from + ((n + i) * vectors + v) * PAIR_LANES) : _mm512_setzero_si512();
            transpose(r);
            for (long i = 0; i < rows; i++)
                put_sixteen(to[v * PAIR_LANES + i] + n * size, r[i], left, dtype);
        }
    }
}

static INLINE void through_wide(const struct matrix *m, const char *x, const int vectors, float *y)
{
    switch (vectors) {
    case 1: through_pairs(m, x, 1, y, NULL); break;
    case 2: through_pairs(m, x, 2, y, NULL); break;
    case 3: through_pairs(m, x, 3, y, NULL); break;
    case 4: through_pairs(m, x, 4, y, NULL); break;
    }
}

/* Rows `first` to `last` of a matrix, which is not quantised. */
static INLINE struct matrix part_of(const struct matrix *m, long first, long last)
{
    struct matrix part = *m;
    part.weights += first * m->stride * 2;
    part.bias = m->bias ? m->bias + 2 * first : NULL;
    part.rows = last - first;
    return part;
}

/* Bytes of x [tokens, columns] once it is packed. */
static long packed_bytes(long tokens, long columns)
{
    return (tokens + PAIR_LANES - 1) / PAIR_LANES * columns / 2 * LINE;
}

static INLINE const char *packed_at(const char *packed, long token, long columns)
{
    return packed + token / PAIR_LANES * (columns / 2) * LINE;
}

/* x [tokens, columns], rows `step` bytes apart -> packed, WIDE rows together. For all threads of a team, and its barrier. */
static void pack_wide(const char *x, long tokens, long columns, long step, char *packed)
{
#pragma omp for schedule(static)
    for (long first = 0; first < tokens; first += WIDE) {
        const long count = tokens - first < WIDE ? tokens - first : WIDE;
        const char *rows[WIDE];
        for (long row = 0; row < count; row++)
            rows[row] = x + (first + row) * step;
        pack_rows(rows, count, columns / 2, (char *)packed_at(packed, first, columns));
    }
}

/* packed x [tokens, m->columns] times the matrix -> y [tokens, m->rows] in `dtype`, rows `step` bytes apart. For all threads
 * of a team, and its barrier. */
static void multiply_wide(const struct matrix *m, const char *packed, long tokens, int dtype, char *y, long step)
{
    const long panels = (m->rows + TALL_PANEL - 1) / TALL_PANEL, blocks = (tokens + WIDE - 1) / WIDE;
#pragma omp for schedule(dynamic, 4)
    for (long unit = 0; unit < panels * blocks; unit++) {
        const long n = unit / blocks * TALL_PANEL, first = unit % blocks * WIDE;
        const long count = tokens - first < WIDE ? tokens - first : WIDE;
        const struct matrix part = part_of(m, n, n + TALL_PANEL < m->rows ? n + TALL_PANEL : m->rows);
        float found[TALL_PANEL * WIDE] __attribute__((aligned(LINE)));
        char *rows[WIDE];
        through_wide(&part, packed_at(packed, first, m->columns), vectors_for(count), found);
        for (long row = 0; row < count; row++)
            rows[row] = y + (first + row) * step + n * (dtype == FLOAT32 ? 4 : 2);
        if (dtype == FLOAT32)
            unpack_rows(found, part.rows, count, FLOAT32, rows);
        else
            unpack_rows(found, part.rows, count, BFLOAT16, rows);
    }
}
