/* As products_many_variant.h, for processors that multiply bfloat16 themselves, after products_pairs.h: a lane holds two neighbouring columns of
 * one row, and one instruction multiplies both with a pair of weights and adds them up. Rows lie across the lanes,
 * [columns / 2, vectors], every pair of weights is spread over a vector of rows, and no sum is ever taken across lanes.
 *
 * A number is summed over the pairs of columns in their order, in its own lane: a row never depends on its batch.
 */

#define PAIR_LANES 16
#define PAIR_VECTORS 4
#define MOST_ROWS 16
/* Tokens of one expert up to which dot products are faster, and the weights of a small one: measured (docs/performance.md). */
#define FEW_OF_SMALL 8
#define FEW_OF_LARGE 24
#define SMALL (1 << 17)

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
        return m->weights + n * m->columns * 2;
    unpack_pairs(m, BFLOAT16, n, count, room);
    return room;
}

/* x [m->columns / 2, vectors] -> y [m->rows, vectors]; `room` [16, m->columns] bfloat16 */
static INLINE void through_pairs(const struct matrix *m, const char *x, const int vectors, float *y, char *room)
{
    const long step = m->columns * 2, lanes = vectors * PAIR_LANES;
    const int most = vectors == 1 ? 16 : 24 / vectors; /* rows of weights at a time: their sums fill the registers */
    long n = 0;
    for (; n + most <= m->rows; n += most)
        spread_pairs(rows_of(m, n, most, room), most, step, x, vectors, m->columns / 2, y + n * lanes);
    for (; n < m->rows; n++)
        spread_pairs(rows_of(m, n, 1, room), 1, step, x, vectors, m->columns / 2, y + n * lanes);
    for (n = 0; m->bias && n < m->rows; n++)
        for (long lane = 0; lane < lanes; lane++)
            y[n * lanes + lane] += number(m->bias + 2 * n, BFLOAT16);
}

/* inner [gate, up][vectors] or [up][vectors], f32 -> to [inner / 2][vectors], pairs */
static INLINE void activate_spread(const struct layout *l, const float *inner, const int vectors, char *to)
{
    for (long i = 0; i < l->inner; i++)
        for (int v = 0; v < vectors; v++) {
            floats_v4 up = {0};
            if (l->gated)
                up = load_v4(inner + (up_row(l, i) * vectors + v) * PAIR_LANES);
            const floats_v4 x = gate_v4(l, load_v4(inner + (gate_row(l, i) * vectors + v) * PAIR_LANES), up);
            const __m512i half = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
            char *pair = to + (i / 2 * vectors + v) * LINE;
            _mm512_storeu_si512(pair, i % 2 ? _mm512_or_si512(_mm512_loadu_si512(pair), _mm512_slli_epi32(half, 16)) : half);
        }
}

static INLINE void forward_spread(const struct layout *l, const char *slot, const int vectors, char *x, float *inner, char *h,
                                 float *out, char *room)
{
    const struct matrix up = up_of(l, slot), down = down_of(l, slot);
    through_pairs(&up, x, vectors, inner, room);
    activate_spread(l, inner, vectors, h);
    through_pairs(&down, h, vectors, out, room);
}

/* One expert's outputs of the tokens of `pairs`, at most PAIR_VECTORS vectors full: x [tokens, hidden] bfloat16 -> y f32
 * [choices, hidden]. Hidden and inner are even. `room` holds `floats_for_expert` floats. */
static void expert_spread(const struct layout *l, const char *slot, const char *x, long top_k, const long *pairs, long count,
                         float *y, float *room)
{
    if (l->dtype == FLOAT32) {
        expert_v4(l, slot, x, top_k, pairs, count, y, room);
        return;
    }
    const int vectors = (int)((count + PAIR_LANES - 1) / PAIR_LANES);
    const long lanes = vectors * PAIR_LANES, wider = l->hidden > l->inner ? l->hidden : l->inner;
    uint32_t *packed = (uint32_t *)room; /* [hidden / 2, lanes] and then, in its place, [inner / 2, lanes] */
    float *inner = room + wider / 2 * lanes, *out = inner;
    char *weights = (char *)aligned(inner + (l->inner * (1 + l->gated) > l->hidden ? l->inner * (1 + l->gated) : l->hidden) * lanes);
    memset(packed, 0, sizeof *packed * (l->hidden / 2) * lanes);
    for (long first = 0; first < l->hidden / 2; first += PAIR_LANES)
        for (long row = 0; row < count; row++)
            for (long i = first; i < first + PAIR_LANES && i < l->hidden / 2; i++)
                memcpy(packed + i * lanes + row, x + pairs[row] / top_k * l->hidden * 2 + 4 * i, 4);
    switch (vectors) {
    case 1: forward_spread(l, slot, 1, (char *)packed, inner, (char *)packed, out, weights); break;
    case 2: forward_spread(l, slot, 2, (char *)packed, inner, (char *)packed, out, weights); break;
    case 3: forward_spread(l, slot, 3, (char *)packed, inner, (char *)packed, out, weights); break;
    case 4: forward_spread(l, slot, 4, (char *)packed, inner, (char *)packed, out, weights); break;
    }
    for (long first = 0; first < l->hidden; first += PAIR_LANES)
        for (long row = 0; row < count; row++)
            for (long i = first; i < first + PAIR_LANES && i < l->hidden; i++)
                y[pairs[row] * l->hidden + i] = out[i * lanes + row];
}
