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

/* y[row][first..last] += columns `k` to k + some of the weights, that lie across, times their numbers of `rows` rows of x,
 * which are floats or, `halved`, bfloat16. */
static INLINE void NAME(add_across)(const struct matrix *m, const int dtype, const int halved, const int some, const int rows,
                                    long k, const float *const *x, float *const *y, long first, long last)
{
    const long size = dtype == FLOAT32 ? 4 : 2;
    const char *from = m->weights + k * m->stride * size;
    float by[BLOCK][TALL];
    for (int row = 0; row < rows; row++)
        for (int i = 0; i < some; i++)
            by[row][i] = halved ? number((const char *)x[row] + (k + i) * 2, BFLOAT16) : x[row][k + i];
    long n = first;
    for (; n + LANES <= last; n += LANES) {
        NAME(floats) sums[BLOCK];
        for (int row = 0; row < rows; row++)
            sums[row] = NAME(load)(y[row] + n);
        for (int i = 0; i < some; i++) {
            __builtin_prefetch(from + ((TALL + i) * m->stride + n) * size, 0, 2);
            const NAME(floats) w = NAME(weights)(from + (i * m->stride + n) * size, dtype);
            for (int row = 0; row < rows; row++)
                sums[row] += w * by[row][i];
        }
        for (int row = 0; row < rows; row++)
            memcpy(y[row] + n, &sums[row], sizeof sums[row]);
    }
    for (; n < last; n++)
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < some; i++)
                y[row][n] += number(from + (i * m->stride + n) * size, dtype) * by[row][i];
}

static INLINE void NAME(rows_across)(const struct matrix *m, const int dtype, const int halved, const int rows,
                                     const float *const *x, float *const *y, long first, long last)
{
    for (int row = 0; row < rows; row++)
        for (long n = first; n < last; n++)
            y[row][n] = m->bias ? number(m->bias + n * (dtype == FLOAT32 ? 4 : 2), dtype) : 0;
    long k = 0;
    for (; k + TALL <= m->columns; k += TALL)
        NAME(add_across)(m, dtype, halved, TALL, rows, k, x, y, first, last);
    for (; k < m->columns; k++)
        NAME(add_across)(m, dtype, halved, 1, rows, k, x, y, first, last);
}

/* As `multiply` of weights that lie across: they are read in their order, TALL columns of the matrix at a time. Parts of a
 * product begin at whole vectors, so that threads change no number. */
static INLINE void NAME(across)(const struct matrix *m, const int dtype, const int halved, const float *const *x,
                                long rows, float *const *y, long first, long last)
{
    first = whole_vectors(first, m->rows);
    last = whole_vectors(last, m->rows);
    for (long row = 0; row < rows; row += BLOCK)
        switch (rows - row) {
        case 1: NAME(rows_across)(m, dtype, halved, 1, x + row, y + row, first, last); break;
#if BLOCK == 4
        case 2: NAME(rows_across)(m, dtype, halved, 2, x + row, y + row, first, last); break;
        case 3: NAME(rows_across)(m, dtype, halved, 3, x + row, y + row, first, last); break;
#endif
        default: NAME(rows_across)(m, dtype, halved, BLOCK, x + row, y + row, first, last);
        }
}

static void NAME(unpack)(const struct matrix *, int, long, long, char *); /* products_coded_variant.h */

static void NAME(multiply)(const struct matrix *m, int dtype, const float *const *x, long rows, float *const *y,
                           long first, long last)
{
    if (m->scales) {
        multiply_coded(NAME(unpack), NAME(multiply), m, dtype, x, rows, y, first, last);
        return;
    }
    if (m->across) {
        if (dtype == FLOAT32)
            NAME(across)(m, FLOAT32, 0, x, rows, y, first, last);
        else
            NAME(across)(m, BFLOAT16, 0, x, rows, y, first, last);
        return;
    }
    if (dtype == FLOAT32)
        NAME(range)(m, FLOAT32, x, rows, y, first, last);
    else
        NAME(range)(m, BFLOAT16, x, rows, y, first, last);
}

/* e to the power of x for x <= 0, to a few units in the last place; 0 far below. */
static INLINE NAME(floats) NAME(exponential)(NAME(floats) x)
{
    typedef int32_t integers __attribute__((vector_size(4 * LANES)));
    const NAME(floats) magic = (NAME(floats)){0} + 12582912.0f; /* 1.5 * 2^23: adding it rounds to whole numbers */
    const integers low = x < -87.0f;
    x = (NAME(floats))((integers)x & ~low);
    const NAME(floats) whole = (x * 1.44269504f + magic) - magic;
    const NAME(floats) r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f; /* ln 2 in two parts */
    NAME(floats) p = (NAME(floats)){0} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const integers power = (__builtin_convertvector(whole, integers) + 127) << 23;
    return (NAME(floats))((integers)(p * (NAME(floats))power) & ~low);
}

/* x / (1 + e^(-alpha x)), by a power of e that can't overflow. */
static INLINE NAME(floats) NAME(silu)(NAME(floats) x, float alpha)
{
    typedef int32_t integers __attribute__((vector_size(4 * LANES)));
    const NAME(floats) of = x * alpha;
    const integers below = of < 0;
    const NAME(floats) e = NAME(exponential)((NAME(floats))((integers)of | INT32_MIN)); /* of -|alpha x| */
    const NAME(floats) times = (NAME(floats))((below & (integers)e) | (~below & (integers)((NAME(floats)){0} + 1)));
    return x * times / (1 + e);
}

/* The gate and up that are CLAMPED, LANES of each -> what goes on. */
static INLINE NAME(floats) NAME(clamped)(NAME(floats) gate, NAME(floats) up, float alpha, float limit)
{
    for (int lane = 0; lane < LANES; lane++) {
        gate[lane] = gate[lane] > limit ? limit : gate[lane]; /* what is no number stays none */
        up[lane] = up[lane] > limit ? limit : up[lane] < -limit ? -limit : up[lane];
    }
    return NAME(silu)(gate, alpha) * (up + 1);
}

/* inner [gate, up], in halves or interleaved -> [inner], in place, as `clamped` says. */
static void NAME(activate_clamped)(const struct layout *l, float *inner)
{
    for (long i = 0; i < l->inner; i += LANES) {
        const long some = l->inner - i < LANES ? l->inner - i : LANES;
        NAME(floats) gate = {0}, up = {0};
        for (long lane = 0; lane < some; lane++) {
            gate[lane] = inner[gate_row(l, i + lane)];
            up[lane] = inner[up_row(l, i + lane)];
        }
        gate = NAME(clamped)(gate, up, l->alpha, l->limit);
        for (long lane = 0; lane < some; lane++)
            inner[i + lane] = gate[lane];
    }
}

/* inner [gate, up] or [up] -> [inner], in place */
static void NAME(activate)(const struct layout *l, float *inner)
{
    long i = 0;
    if (l->activation == CLAMPED) {
        NAME(activate_clamped)(l, inner);
        return;
    }
    for (; l->activation == SILU && i + LANES <= l->inner; i += LANES) {
        NAME(floats) x = NAME(silu)(NAME(load)(inner + i), 1);
        if (l->gated)
            x *= NAME(load)(inner + l->inner + i);
        memcpy(inner + i, &x, sizeof x);
    }
    for (; i < l->inner; i++)
        inner[i] = activated(inner[i], l->activation) * (l->gated ? inner[l->inner + i] : 1);
}

/* scores [count], with room for whole vectors -> their softmax, in place; 0 where all are -INFINITY. `sink` is one score
 * more, -INFINITY for none. */
static void NAME(softmax)(float *scores, long count, float sink)
{
    const long columns = (count + LANES - 1) / LANES * LANES;
    for (long i = count; i < columns; i++)
        scores[i] = -INFINITY;
    NAME(floats) most = (NAME(floats)){0} - INFINITY;
    for (long at = 0; at < columns; at += LANES) {
        const NAME(floats) v = NAME(load)(scores + at);
        for (int lane = 0; lane < LANES; lane++)
            most[lane] = v[lane] > most[lane] ? v[lane] : most[lane];
    }
    float best = sink;
    for (int lane = 0; lane < LANES; lane++)
        best = most[lane] > best ? most[lane] : best;
    if (best == -INFINITY) {
        memset(scores, 0, sizeof(float) * columns);
        return;
    }
    NAME(floats) sums = {0};
    for (long at = 0; at < columns; at += LANES) {
        const NAME(floats) v = NAME(exponential)(NAME(load)(scores + at) - best);
        sums += v;
        memcpy(scores + at, &v, sizeof v);
    }
    const float scale = 1 / (sink == -INFINITY ? NAME(sum)(sums) : NAME(sum)(sums) + expf(sink - best));
    for (long at = 0; at < columns; at++)
        scores[at] *= scale;
}

/* to [rows][width] += weights[row][i] * the values of the i-th column seen, `some` of them, one or four, from i on. */
static INLINE void NAME(blend)(const char *const *from, const int some, const int dtype, long width, const float *weights,
                               long stride, const int rows, float *const *to)
{
    const long size = dtype == FLOAT32 ? 4 : 2;
    long d = 0;
    for (; d + LANES <= width; d += LANES) {
        NAME(floats) v[4];
        for (int i = 0; i < some; i++)
            v[i] = NAME(weights)(from[i] + d * size, dtype);
        for (int row = 0; row < rows; row++) {
            NAME(floats) sum = NAME(load)(to[row] + d);
            for (int i = 0; i < some; i++)
                sum += v[i] * weights[row * stride + i];
            memcpy(to[row] + d, &sum, sizeof sum);
        }
    }
    for (; d < width; d++)
        for (int row = 0; row < rows; row++)
            for (int i = 0; i < some; i++)
                to[row][d] += weights[row * stride + i] * number(from[i] + d * size, dtype);
}

/* Attention of some heads that share keys and values, over the columns seen. q [rows][key width]; room for
 * [rows][c->room] scores; to [rows][value width]. */
static INLINE void NAME(heads)(const struct cache *c, const struct seen *seen, const int dtype, const float *const *q,
                               const int rows, const float *sinks, float *scores, float *const *to)
{
    for (long i = 0; i < seen->count; i++) {
        float found[BLOCK];
        NAME(dots)(seen->keys + seen->columns[i] * c->key_column, dtype, q, rows, c->key_width, found);
        for (int row = 0; row < rows; row++)
            scores[row * c->room + i] = found[row] * seen->scale;
    }
    for (int row = 0; row < rows; row++) {
        NAME(softmax)(scores + row * c->room, seen->count, sinks ? sinks[row] : -INFINITY);
        memset(to[row], 0, sizeof(float) * c->value_width);
    }
    const long line = c->value_width * (dtype == FLOAT32 ? 4 : 2);
    for (long i = 0; i < seen->count;) {
        const int some = seen->count - i < 4 ? 1 : 4;
        const char *from[4];
        for (int next = 0; next < some; next++) {
            from[next] = seen->values + seen->columns[i + next] * c->value_column;
            for (long at = 0; at < line; at += LINE)
                __builtin_prefetch(from[next] + AHEAD + at, 0, 1);
        }
        if (some == 4)
            NAME(blend)(from, 4, dtype, c->value_width, scores + i, c->room, rows, to);
        else
            NAME(blend)(from, 1, dtype, c->value_width, scores + i, c->room, rows, to);
        i += some;
    }
}

static INLINE void NAME(blocks)(const struct cache *c, const struct seen *seen, const int dtype, const float *const *q,
                                float *scores, float *const *to)
{
    for (long row = 0; row < c->groups; row += BLOCK) {
        const float *sinks = seen->sinks ? seen->sinks + row : NULL;
        switch (c->groups - row) {
        case 1: NAME(heads)(c, seen, dtype, q + row, 1, sinks, scores, to + row); break;
#if BLOCK == 4
        case 2: NAME(heads)(c, seen, dtype, q + row, 2, sinks, scores, to + row); break;
        case 3: NAME(heads)(c, seen, dtype, q + row, 3, sinks, scores, to + row); break;
#endif
        default: NAME(heads)(c, seen, dtype, q + row, BLOCK, sinks, scores, to + row);
        }
    }
}

static void NAME(attend)(const struct cache *c, const struct seen *seen, int dtype, const float *const *q, float *scores,
                         float *const *to)
{
    if (dtype == FLOAT32)
        NAME(blocks)(c, seen, FLOAT32, q, scores, to);
    else
        NAME(blocks)(c, seen, BFLOAT16, q, scores, to);
}
