/* The loops of products.c for one instruction set. Included once a set: NAME(x) makes names of its own, LANES floats are
 * a vector, BLOCK rows share one reading of the weights. Vectors are GCC's and Clang's own, so the compiler picks the
 * instructions.
 *
 * A dot product is summed in one order, whatever other rows are computed beside it: a row never depends on its batch.
 */

typedef float NAME(floats) __attribute__((vector_size(4 * LANES)));
typedef uint32_t NAME(words) __attribute__((vector_size(4 * LANES)));
typedef uint16_t NAME(halves) __attribute__((vector_size(2 * LANES)));

static INLINE NAME(floats) NAME(load)(const float *from)
{
    NAME(floats) v;
    memcpy(&v, from, sizeof v);
    return v;
}

/* LANES weights as floats; a bfloat16 is the upper half of one. */
static INLINE NAME(floats) NAME(weights)(const char *from, const int dtype)
{
    if (dtype == FLOAT32)
        return NAME(load)((const float *)from);
    NAME(halves) h;
    memcpy(&h, from, sizeof h);
    NAME(words) w = __builtin_convertvector(h, NAME(words)) << 16;
    NAME(floats) v;
    memcpy(&v, &w, sizeof v);
    return v;
}

static INLINE float NAME(sum)(NAME(floats) v)
{
    four parts[LANES / 4];
    memcpy(parts, &v, sizeof v);
    for (int half = LANES / 8; half; half /= 2)
        for (int i = 0; i < half; i++)
            parts[i] += parts[i + half];
    return (parts[0][0] + parts[0][1]) + (parts[0][2] + parts[0][3]);
}

/* One row of weights [columns] times `rows` rows of x -> y[rows]. */
static INLINE void NAME(dots)(const char *w, const int dtype, const float *const *x, const int rows, long columns,
                              float *y)
{
    const long size = dtype == FLOAT32 ? 4 : 2, step = 4 * LANES;
    NAME(floats) sums[BLOCK][4];
    memset(sums, 0, sizeof sums);
    long k = 0;
    for (; k + step <= columns; k += step) {
        for (long line = 0; line < step * size; line += LINE)
            __builtin_prefetch(w + k * size + AHEAD + line, 0, 1);
        for (int part = 0; part < 4; part++) {
            const NAME(floats) v = NAME(weights)(w + (k + part * LANES) * size, dtype);
            for (int row = 0; row < rows; row++)
                sums[row][part] += v * NAME(load)(x[row] + k + part * LANES);
        }
    }
    for (; k + LANES <= columns; k += LANES) {
        const NAME(floats) v = NAME(weights)(w + k * size, dtype);
        for (int row = 0; row < rows; row++)
            sums[row][0] += v * NAME(load)(x[row] + k);
    }
    for (int row = 0; row < rows; row++) {
        float all = NAME(sum)((sums[row][0] + sums[row][1]) + (sums[row][2] + sums[row][3]));
        for (long rest = k; rest < columns; rest++)
            all += number(w + rest * size, dtype) * x[row][rest];
        y[row] = all;
    }
}

/* Rows `first` to `last` of the weights times `rows` rows of x; result n of row r goes to y[r][n]. */
static INLINE void NAME(range)(const struct matrix *m, const int dtype, const float *const *x, long rows, float *const *y,
                               long first, long last)
{
    for (long n = first; n < last; n++) {
        const char *w = m->weights + n * m->stride * (dtype == FLOAT32 ? 4 : 2);
        const float bias = m->bias ? number(m->bias + n * (dtype == FLOAT32 ? 4 : 2), dtype) : 0;
        for (long row = 0; row < rows; row += BLOCK) {
            float found[BLOCK];
            switch (rows - row) {
            case 1: NAME(dots)(w, dtype, x + row, 1, m->columns, found); break;
#if BLOCK == 4
            case 2: NAME(dots)(w, dtype, x + row, 2, m->columns, found); break;
            case 3: NAME(dots)(w, dtype, x + row, 3, m->columns, found); break;
#endif
            default: NAME(dots)(w, dtype, x + row, BLOCK, m->columns, found);
            }
            for (long r = row; r < rows && r < row + BLOCK; r++)
                y[r][n] = m->bias ? found[r - row] + bias : found[r - row];
        }
    }
}

static void NAME(multiply)(const struct matrix *m, int dtype, const float *const *x, long rows, float *const *y,
                           long first, long last)
{
    if (dtype == FLOAT32)
        NAME(range)(m, FLOAT32, x, rows, y, first, last);
    else
        NAME(range)(m, BFLOAT16, x, rows, y, first, last);
}
