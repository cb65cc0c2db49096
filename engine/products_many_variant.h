/* One expert's feed-forward for many rows, for one instruction set; included after products_variant.h. Where that reads
 * the weights once and dots them with a few rows, here rows lie across the lanes, [columns, rows], from the first product
 * to the last: every weight is spread over a vector of rows, and no sum is ever taken across lanes.
 *
 * A number is summed over the columns in their order, in its own lane: a row never depends on its batch.
 */

/* `rows` rows of weights, widened, times x [columns, vectors] -> y [rows, vectors]. */
static INLINE void NAME(spread)(const float *w, const int rows, const float *x, const int vectors, long columns, float *y)
{
    NAME(floats) sums[4][VECTORS];
    memset(sums, 0, sizeof sums);
    for (long k = 0; k < columns; k++)
        for (int v = 0; v < vectors; v++) {
            const NAME(floats) here = NAME(load)(x + (k * vectors + v) * LANES);
            for (int row = 0; row < rows; row++)
                sums[row][v] += w[row * columns + k] * here;
        }
    for (int row = 0; row < rows; row++)
        for (int v = 0; v < vectors; v++)
            memcpy(y + (row * vectors + v) * LANES, &sums[row][v], sizeof sums[row][v]);
}

static INLINE void NAME(widen)(const char *from, const int dtype, long count, float *to)
{
    const long size = dtype == FLOAT32 ? 4 : 2;
    long i = 0;
    for (; i + LANES <= count; i += LANES) {
        const NAME(floats) v = NAME(weights)(from + i * size, dtype);
        memcpy(to + i, &v, sizeof v);
    }
    for (; i < count; i++)
        to[i] = number(from + i * size, dtype);
}

/* x [m->columns, vectors] -> y [m->rows, vectors]; `room` [4, m->columns]. Rows of weights lie in one piece. */
static INLINE void NAME(through)(const struct matrix *m, const int dtype, const float *x, const int vectors, float *y,
                                 float *room)
{
    const long size = dtype == FLOAT32 ? 4 : 2;
    for (long n = 0; n < m->rows; n += 4) {
        const int rows = m->rows - n < 4 ? (int)(m->rows - n) : 4;
        const char *from = m->weights + n * m->columns * size;
        const float *w = room;
        if (m->scales) /* into the upper half of the room, where widening does not overtake itself */
            from = (char *)room + (4 - size) * rows * m->columns, NAME(unpack)(m, dtype, n, rows, (char *)from);
        if (dtype == FLOAT32)
            w = (const float *)from;
        else
            NAME(widen)(from, dtype, rows * m->columns, room);
        if (rows == 4)
            NAME(spread)(w, 4, x, vectors, m->columns, y + n * vectors * LANES);
        else
            for (int row = 0; row < rows; row++)
                NAME(spread)(w + row * m->columns, 1, x, vectors, m->columns, y + (n + row) * vectors * LANES);
        for (int row = 0; m->bias && row < rows; row++)
            for (long lane = 0; lane < vectors * LANES; lane++)
                y[(n + row) * vectors * LANES + lane] += number(m->bias + (n + row) * size, dtype);
    }
}

/* What becomes of LANES numbers of an expert's first product; `up` is not looked at without a gate. */
static INLINE NAME(floats) NAME(gate)(const struct layout *l, NAME(floats) x, NAME(floats) up)
{
    if (l->activation == CLAMPED)
        return NAME(clamped)(x, up, l->alpha, l->limit);
    if (l->activation == SILU) {
        x = NAME(silu)(x, 1);
    } else {
        for (int lane = 0; lane < LANES; lane++)
            x[lane] = activated(x[lane], l->activation);
    }
    return l->gated ? x * up : x;
}

/* inner [gate, up][vectors] or [up][vectors] -> [inner][vectors], in place: nothing is written before it was read */
static INLINE void NAME(activate_wide)(const struct layout *l, float *inner, const int vectors)
{
    for (long i = 0; i < l->inner; i++)
        for (int v = 0; v < vectors; v++) {
            const float *at = inner + (gate_row(l, i) * vectors + v) * LANES;
            NAME(floats) x = NAME(load)(at), up = {0};
            if (l->gated)
                up = NAME(load)(inner + (up_row(l, i) * vectors + v) * LANES);
            x = NAME(gate)(l, x, up);
            memcpy(inner + (i * vectors + v) * LANES, &x, sizeof x);
        }
}

static INLINE void NAME(forward)(const struct layout *l, const char *slot, const int dtype, const int vectors, float *x,
                                 float *inner, float *room)
{
    const struct matrix up = up_of(l, slot), down = down_of(l, slot);
    NAME(through)(&up, dtype, x, vectors, inner, room);
    NAME(activate_wide)(l, inner, vectors);
    NAME(through)(&down, dtype, inner, vectors, x, room);
}

/* One expert's outputs of the tokens of `pairs`, at most VECTORS vectors full: x [tokens, hidden] as it is stored -> y f32
 * [pairs, hidden]. `room` holds `room_for_expert` floats. */
static void NAME(expert)(const struct layout *l, const char *slot, const char *x, long top_k, const long *pairs, long count,
                         float *y, float *room)
{
    const long size = l->dtype == FLOAT32 ? 4 : 2;
    const int vectors = (int)((count + LANES - 1) / LANES);
    const long lanes = vectors * LANES;
    float *inner = room + l->hidden * lanes, *weights = inner + l->inner * (1 + l->gated) * lanes;
    memset(room, 0, sizeof(float) * l->hidden * lanes); /* lanes without a row compute nothing that matters, but fast */
    for (long row = 0; row < count; row++) {
        NAME(widen)(x + pairs[row] / top_k * l->hidden * size, l->dtype, l->hidden, weights);
        for (long i = 0; i < l->hidden; i++)
            room[i * lanes + row] = weights[i];
    }
    switch (vectors * 2 + l->dtype) {
    case 2: NAME(forward)(l, slot, FLOAT32, 1, room, inner, weights); break;
    case 3: NAME(forward)(l, slot, BFLOAT16, 1, room, inner, weights); break;
    case 4: NAME(forward)(l, slot, FLOAT32, 2, room, inner, weights); break;
    case 5: NAME(forward)(l, slot, BFLOAT16, 2, room, inner, weights); break;
#if VECTORS == 4
    case 6: NAME(forward)(l, slot, FLOAT32, 3, room, inner, weights); break;
    case 7: NAME(forward)(l, slot, BFLOAT16, 3, room, inner, weights); break;
    case 8: NAME(forward)(l, slot, FLOAT32, 4, room, inner, weights); break;
    case 9: NAME(forward)(l, slot, BFLOAT16, 4, room, inner, weights); break;
#endif
    }
    for (long row = 0; row < count; row++)
        for (long i = 0; i < l->hidden; i++)
            y[pairs[row] * l->hidden + i] = room[i * lanes + row];
}

/* Rows `first` to `last` of a matrix that is not quantised and does not lie across times `count` rows of x [.., m->columns],
 * at most VECTORS vectors full -> y [.., m->rows], both as they are stored. `room` holds `floats_for_rows` floats. */
static void NAME(multiply_many)(const struct matrix *m, int dtype, const char *x, long count, long first, long last, char *y,
                                float *room)
{
    const long size = dtype == FLOAT32 ? 4 : 2, columns = m->columns;
    const int vectors = (int)((count + LANES - 1) / LANES);
    const long lanes = vectors * LANES;
    float *found = room + columns * lanes, *weights = found + PANEL_ROWS * lanes;
    memset(room, 0, sizeof(float) * columns * lanes);
    for (long row = 0; row < count; row++) {
        NAME(widen)(x + row * columns * size, dtype, columns, weights);
        for (long k = 0; k < columns; k++)
            room[k * lanes + row] = weights[k];
    }
    for (long n = first; n < last; n += PANEL_ROWS) {
        const long rows = last - n < PANEL_ROWS ? last - n : PANEL_ROWS;
        struct matrix part = *m;
        part.weights += n * columns * size, part.rows = rows;
        part.bias = m->bias ? m->bias + n * size : NULL;
        switch (vectors * 2 + dtype) {
        case 2: NAME(through)(&part, FLOAT32, room, 1, found, weights); break;
        case 3: NAME(through)(&part, BFLOAT16, room, 1, found, weights); break;
        case 4: NAME(through)(&part, FLOAT32, room, 2, found, weights); break;
        case 5: NAME(through)(&part, BFLOAT16, room, 2, found, weights); break;
        }
        for (long row = 0; row < count; row++)
            for (long i = 0; i < rows; i++)
                put(y + (row * m->rows + n + i) * size, found[i * lanes + row], dtype);
    }
}
