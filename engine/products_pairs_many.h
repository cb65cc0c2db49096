/* As products_many_variant.h, for processors that multiply bfloat16 themselves: an expert from its first product to its last
 * with rows across the lanes, as products_pairs_wide.h has them.
 */

/* Tokens of one expert up to which dot products are faster, and the weights of a small one: measured (docs/performance.md). */
#define FEW_OF_SMALL 8
#define FEW_OF_LARGE 24
#define SMALL (1 << 17)

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
    const char *inputs[WIDE];
    char *outputs[WIDE];
    for (long row = 0; row < count; row++) {
        inputs[row] = x + pairs[row] / top_k * l->hidden * 2;
        outputs[row] = (char *)(y + pairs[row] * l->hidden);
    }
    pack_rows(inputs, count, l->hidden / 2, (char *)packed);
    switch (vectors) {
    case 1: forward_spread(l, slot, 1, (char *)packed, inner, (char *)packed, out, weights); break;
    case 2: forward_spread(l, slot, 2, (char *)packed, inner, (char *)packed, out, weights); break;
    case 3: forward_spread(l, slot, 3, (char *)packed, inner, (char *)packed, out, weights); break;
    case 4: forward_spread(l, slot, 4, (char *)packed, inner, (char *)packed, out, weights); break;
    }
    unpack_rows(out, l->hidden, count, FLOAT32, outputs);
}
