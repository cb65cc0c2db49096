/* A decoder layer for many new tokens a row in two calls, as products_layer.h has it for single ones: from its input to the
 * router's choice, and from there to its output. Rows lie across the lanes (products_pairs_wide.h), so only where the
 * processor multiplies pairs of bfloat16. Included last, for AVX-512 BF16.
 *
 * Numbers are rounded where they are for single tokens. Memory comes from Python: what a call needs is carved out of one
 * piece, and a call that finds too little says how much it needs and does nothing else.
 */

static INLINE __m512 wide_at(const char *from, __mmask16 left)
{
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(left, from)), 16);
}

static INLINE __m512 rounded_sixteen(__m512 x)
{
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16);
}

static INLINE void put_rounded(char *to, __m512 x, __mmask16 left)
{
    _mm256_mask_storeu_epi16(to, left, (__m256i)_mm512_cvtneps_pbh(x));
}

static INLINE __mmask16 sixteen_of(long count)
{
    return count >= PAIR_LANES ? 0xffff : (1u << count) - 1;
}

/* As `norm_rows`, one row, its squares summed up in another order. */
static void norm_pairs(const struct norm *n, const char *x, char *to)
{
    __m512 squares = _mm512_setzero_ps();
    for (long i = 0; i < n->width; i += PAIR_LANES) {
        const __m512 value = wide_at(x + 2 * i, sixteen_of(n->width - i));
        squares = _mm512_add_ps(squares, _mm512_mul_ps(value, value));
    }
    const float scale = 1 / sqrtf(_mm512_reduce_add_ps(squares) / n->width + n->least);
    for (long i = 0; i < n->width; i += PAIR_LANES) {
        const __mmask16 left = sixteen_of(n->width - i);
        const __m512 normed = rounded_sixteen(wide_at(x + 2 * i, left) * _mm512_set1_ps(scale));
        put_rounded(to + 2 * i, wide_at(n->weights + 2 * i, left) * normed, left);
    }
}

/* to = one + other, of `count` numbers */
static void add_pairs(const char *one, const char *other, long count, char *to)
{
    for (long i = 0; i < count; i += PAIR_LANES) {
        const __mmask16 left = sixteen_of(count - i);
        put_rounded(to + 2 * i, wide_at(one + 2 * i, left) + wide_at(other + 2 * i, left), left);
    }
}

static void narrow_pairs(const float *from, long count, char *to)
{
    for (long i = 0; i < count; i += PAIR_LANES) {
        const __mmask16 left = sixteen_of(count - i);
        put_rounded(to + 2 * i, _mm512_maskz_loadu_ps(left, from + i), left);
    }
}

/* The new tokens of one call beside what `struct call` says: `fresh` of each row; strides in bytes from one token to the next
 * of positions and of the mask; which of them count, bytes [tokens], or NULL: all; whether they are routed here. */
struct prompt {
    const struct layer *layer;
    const struct cache *cache;
    const struct call *to;
    long fresh, tokens, position_token, mask_token;
    const char *valid;
    int routed;
};

struct prompt_room {
    char *packed, *asked, *attended, *logits, *threads;
    float *q, *k, *v;
    long thread_bytes;
    struct sight *sight;
    int32_t *seen;
};

static void carve_prompt(const struct prompt *p, struct arena *a, struct prompt_room *r, int threads)
{
    const struct block *b = &p->layer->block;
    const long t = p->tokens, widest = b->q.columns > b->out.columns ? b->q.columns : b->out.columns;
    const long turning = 2 * sizeof(float) * b->rotary, share = sizeof(float) * (p->layer->choice.experts + PAIR_LANES);
    r->thread_bytes = attend_bytes(p->cache);
    r->thread_bytes = (r->thread_bytes > turning + share ? r->thread_bytes : turning + share) + 2 * LINE;
    r->packed = carve(a, packed_bytes(t, widest));
    r->q = carve(a, sizeof(float) * t * b->q.rows);
    r->k = carve(a, sizeof(float) * t * b->k.rows);
    r->v = carve(a, sizeof(float) * t * b->v.rows);
    r->asked = carve(a, 2 * t * b->q.rows);
    r->attended = carve(a, 2 * t * b->out.rows);
    r->logits = carve(a, 2 * t * p->layer->choice.experts);
    r->threads = carve(a, threads * r->thread_bytes);
    r->sight = carve(a, sizeof(struct sight) * p->cache->rows);
    r->seen = carve(a, 2 * sizeof(int32_t) * t);
}

/* One token's queries become `asked`, its keys and values a column of the cache. `turns` is room for cosines and sines. */
static void place_token(const struct prompt *p, const struct prompt_room *r, long token, float *turns)
{
    const struct block *b = &p->layer->block;
    const struct cache *c = p->cache;
    const long row = token / p->fresh, t = token % p->fresh, column = c->columns - p->fresh + t;
    const long count = b->turning == HALVES_ONCE ? b->rotary / 2 : b->rotary;
    const long position = row * p->to->position_row + t * p->position_token;
    float *q = r->q + token * b->q.rows, *k = r->k + token * b->k.rows, *cos = turns, *sin = turns + b->rotary;
    widen(p->to->cos + position, b->positions, count, cos);
    widen(p->to->sin + position, b->positions, count, sin);
    arrange(b, c, q, k, cos, sin);
    narrow_pairs(q, b->q.rows, r->asked + token * b->q.rows * 2);
    for (long head = 0; head < c->heads; head++) {
        narrow_pairs(k + head * b->head, b->head, p->to->keys + row * c->key_row + head * c->key_head + column * c->key_column);
        narrow_pairs(r->v + token * b->v.rows + head * b->head, b->head,
                     p->to->values + row * c->value_row + head * c->value_head + column * c->value_column);
    }
}

/* From x to keys, values and queries. This and what follows are for all threads of a team, and end with its barrier. */
static void prompt_in(const struct prompt *p, const struct prompt_room *r)
{
    const struct block *b = &p->layer->block;
    const long hidden = b->q.columns;
#pragma omp for
    for (long token = 0; token < p->tokens; token++)
        norm_pairs(&p->layer->before, p->to->x + token * hidden * 2, p->to->normed + token * hidden * 2);
    pack_wide(p->to->normed, p->tokens, hidden, hidden * 2, r->packed);
    multiply_wide(&b->q, r->packed, p->tokens, FLOAT32, (char *)r->q, b->q.rows * 4);
    multiply_wide(&b->k, r->packed, p->tokens, FLOAT32, (char *)r->k, b->k.rows * 4);
    multiply_wide(&b->v, r->packed, p->tokens, FLOAT32, (char *)r->v, b->v.rows * 4);
#pragma omp for
    for (long token = 0; token < p->tokens; token++)
        place_token(p, r, token, (float *)(r->threads + omp_get_thread_num() * r->thread_bytes));
}

/* Attention, its output added to the residual stream, and the same normed. What attention gives takes its queries' place. */
static void prompt_attend(const struct prompt *p, const struct prompt_room *r)
{
    const struct block *b = &p->layer->block;
    const struct cache *c = p->cache;
    const long hidden = b->q.columns;
#pragma omp for schedule(dynamic)
    for (long unit = 0; unit < c->rows * c->heads; unit++)
        attend_many(c, r->sight, p->fresh, unit / c->heads, unit % c->heads, r->asked, p->to->keys, p->to->values, b->scale,
                    r->asked, r->threads + omp_get_thread_num() * r->thread_bytes);
    pack_wide(r->asked, p->tokens, b->out.columns, b->out.columns * 2, r->packed);
    multiply_wide(&b->out, r->packed, p->tokens, BFLOAT16, r->attended, hidden * 2);
#pragma omp for
    for (long token = 0; token < p->tokens; token++) {
        const long at = token * hidden * 2;
        add_pairs(p->to->x + at, r->attended + at, hidden, p->to->middle + at);
        norm_pairs(&p->layer->after, p->to->middle + at, p->to->normed + at);
    }
}

/* Which of the sixteen experts from e on there are and may be chosen. */
static INLINE __mmask16 open_at(const struct choice *c, const char *forbidden, long e)
{
    const __mmask16 left = sixteen_of(c->experts - e);
    if (!forbidden)
        return left;
    return _mm_mask_cmpeq_epi8_mask(left, _mm_maskz_loadu_epi8(left, forbidden + e), _mm_setzero_si128());
}

/* logits [experts] -> their softmax over what is not forbidden, then TAKEN up to a whole vector. What is divided by. */
static float shares_pairs(const struct choice *c, const char *logits, const char *forbidden, float *share)
{
    const __m512 taken = _mm512_set1_ps(TAKEN);
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (long e = 0; e < c->experts; e += PAIR_LANES) {
        const __mmask16 open = open_at(c, forbidden, e);
        most = _mm512_mask_max_ps(most, open, wide_at(logits + 2 * e, open), most);
    }
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (long e = 0; e < c->experts; e += PAIR_LANES) {
        const __mmask16 open = open_at(c, forbidden, e);
        const __m512 power = (__m512)exponential_v4((floats_v4)(wide_at(logits + 2 * e, open) - most));
        sum = _mm512_mask_add_ps(sum, open, sum, power);
        _mm512_storeu_ps(share + e, _mm512_mask_blend_ps(open, taken, power));
    }
    const float all = _mm512_reduce_add_ps(sum);
    for (long e = 0; e < c->experts; e += PAIR_LANES) {
        const __m512 power = _mm512_loadu_ps(share + e);
        _mm512_storeu_ps(share + e, _mm512_mask_div_ps(power, open_at(c, forbidden, e), power, _mm512_set1_ps(all)));
    }
    return all;
}

/* The first of the largest shares, which becomes TAKEN; -1 where none is left. */
static long take_best(float *share, long experts, float *best)
{
    __m512 most = _mm512_set1_ps(TAKEN);
    for (long e = 0; e < experts; e += PAIR_LANES)
        most = _mm512_max_ps(most, _mm512_loadu_ps(share + e));
    *best = _mm512_reduce_max_ps(most);
    for (long e = 0; *best >= 0 && e < experts; e += PAIR_LANES) {
        const __mmask16 found = _mm512_cmp_ps_mask(_mm512_loadu_ps(share + e), _mm512_set1_ps(*best), _CMP_EQ_OQ);
        if (found) {
            const long here = e + __builtin_ctz(found);
            share[here] = TAKEN;
            return here;
        }
    }
    return -1;
}

/* As `shares` and `choose`. */
static void choose_pairs(const struct choice *c, const char *logits, const char *forbidden, long calls, float *share,
                         int64_t *index, char *weights)
{
    const long size = c->dtype == FLOAT32 ? 4 : 2;
    const float all = shares_pairs(c, logits, forbidden, share);
    float sum = 0, chosen[c->top_k];
    if (isnan(all)) {
        choose(c, share, calls, index, weights);
        return;
    }
    for (long place = 0; place < c->top_k; place++) {
        const long best = place < calls ? take_best(share, c->experts, chosen + place) : -1;
        index[place] = best < 0 ? c->experts : best;
        chosen[place] = best < 0 ? 0 : chosen[place];
        sum += chosen[place];
    }
    for (long place = 0; place < c->top_k; place++)
        put(weights + place * size, (c->renormalise ? chosen[place] / sum : chosen[place]) * c->scale, c->dtype);
}

/* As `route`; what is padding gets no expert. */
static void route_token(const struct prompt *p, const char *logits, long token, float *share)
{
    const struct choice *c = &p->layer->choice;
    const struct call *to = p->to;
    const long row = token / p->fresh, at = token * c->top_k, size = c->dtype == FLOAT32 ? 4 : 2;
    logits += token * c->experts * 2;
    if (to->free_weights)
        choose_pairs(c, logits, NULL, c->top_k, share, to->free_index + at, to->free_weights + at * size);
    choose_pairs(c, logits, to->forbidden ? to->forbidden + row * to->forbidden_row : NULL, to->calls ? to->calls[row] : c->top_k,
                 share, to->index + at, to->weights + at * size);
    for (long place = 0; p->valid && !p->valid[token] && place < c->top_k; place++)
        to->index[at + place] = c->experts;
}

static void prompt_route(const struct prompt *p, const struct prompt_room *r)
{
    const struct choice *c = &p->layer->choice;
    const long hidden = p->layer->before.width;
    const struct matrix m = {c->weights, NULL, c->experts, hidden, hidden};
    pack_wide(p->to->normed, p->tokens, hidden, hidden * 2, r->packed);
    multiply_wide(&m, r->packed, p->tokens, BFLOAT16, r->logits, c->experts * 2);
#pragma omp for
    for (long token = 0; token < p->tokens; token++)
        route_token(p, r->logits, token, (float *)(r->threads + omp_get_thread_num() * r->thread_bytes));
}

/* The bytes that are needed where `size` is less; 0: done. */
static long run_prompt(const struct prompt *p, char *room, long size, int threads)
{
    struct arena a = {room, 0};
    struct prompt_room r;
    carve_prompt(p, &a, &r, threads);
    if (a.used > size)
        return a.used;
    look_all(p->cache, p->fresh, p->to->mask, p->mask_token, r.sight, r.seen);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        prompt_in(p, &r);
        prompt_attend(p, &r);
        if (p->routed)
            prompt_route(p, &r);
    }
    return 0;
}

/* A layer's end for many tokens: what the chosen experts gave, y f32 [tokens, top_k, hidden], and their weights; a choice
 * of which `index` is `nobody` is left out. What the shared expert gives of x is added, and `middle`, or NULL. */
struct ending {
    const float *y;
    const int64_t *index;
    long nobody;
    const char *weights, *x, *middle;
    long tokens, top_k, hidden;
    int weights_dtype;
    const struct shared *shared; /* without weights: none */
    char *out;
};

struct ending_room {
    float *outputs, *shares;
    char *packed, *gates, *inner;
};

static void carve_ending(const struct ending *e, struct arena *a, struct ending_room *r)
{
    const long t = e->tokens, inner = e->shared->inside.inner;
    if (!e->shared->down.weights)
        return;
    r->packed = carve(a, packed_bytes(t, e->hidden));
    r->gates = carve(a, 2 * sizeof(float) * t * inner);
    r->inner = carve(a, packed_bytes(t, inner));
    r->outputs = carve(a, sizeof(float) * t * e->hidden);
    r->shares = carve(a, sizeof(float) * t);
}

static void share_many(const struct ending *e, const struct ending_room *r)
{
    const struct shared *s = e->shared;
    const long hidden = e->hidden, inner = s->inside.inner, step = 2 * sizeof(float) * inner;
    pack_wide(e->x, e->tokens, hidden, hidden * 2, r->packed);
    multiply_wide(&s->gate, r->packed, e->tokens, FLOAT32, r->gates, step);
    multiply_wide(&s->up, r->packed, e->tokens, FLOAT32, r->gates + sizeof(float) * inner, step);
    if (s->share.weights)
        multiply_wide(&s->share, r->packed, e->tokens, FLOAT32, (char *)r->shares, sizeof(float));
#pragma omp for
    for (long token = 0; token < e->tokens; token++)
        activate_pairs(&s->inside, (float *)(r->gates + token * step));
    pack_wide(r->gates, e->tokens, inner, step, r->inner);
    multiply_wide(&s->down, r->inner, e->tokens, FLOAT32, (char *)r->outputs, sizeof(float) * hidden);
}

/* One token: its experts, weighed, in the router's order, what of the shared one is its, and the residual stream. */
static void end_token(const struct ending *e, const struct ending_room *r, long token)
{
    const long hidden = e->hidden, first = token * e->top_k, size = e->weights_dtype == FLOAT32 ? 4 : 2;
    const int shared = e->shared->down.weights != NULL, all = !e->shared->share.weights;
    const float share = !shared || all ? 1 : rounded(1 / (1 + expf(-rounded(r->shares[token], BFLOAT16))), BFLOAT16);
    for (long i = 0; i < hidden; i += PAIR_LANES) {
        const __mmask16 left = sixteen_of(hidden - i);
        __m512 sum = _mm512_setzero_ps();
        for (long pair = first; pair < first + e->top_k; pair++)
            if (e->index[pair] != e->nobody) {
                const __m512 weight = _mm512_set1_ps(number(e->weights + pair * size, e->weights_dtype));
                sum += weight * _mm512_maskz_loadu_ps(left, e->y + pair * hidden + i);
            }
        sum = rounded_sixteen(sum);
        if (shared) {
            const __m512 output = rounded_sixteen(_mm512_maskz_loadu_ps(left, r->outputs + token * hidden + i));
            sum = rounded_sixteen(sum + (all ? output : rounded_sixteen(_mm512_set1_ps(share) * output)));
        }
        if (e->middle)
            sum += wide_at(e->middle + (token * hidden + i) * 2, left);
        put_rounded(e->out + (token * hidden + i) * 2, sum, left);
    }
}

/* The bytes that are needed where `size` is less; 0: done. */
static long run_ending(const struct ending *e, char *room, long size, int threads)
{
    struct arena a = {room, 0};
    struct ending_room r = {0};
    carve_ending(e, &a, &r);
    if (a.used > size)
        return a.used;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        if (e->shared->down.weights)
            share_many(e, &r);
#pragma omp for
        for (long token = 0; token < e->tokens; token++)
            end_token(e, &r, token);
    }
    return 0;
}
