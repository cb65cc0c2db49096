/* Attention of many new tokens over keys and values in bfloat16, with queries across the lanes (products_pairs_wide.h):
 * scores are [columns, queries], so that neither their softmax nor a sum over values is ever taken across lanes.
 *
 * Columns are counted from the first that any token of the row sees, and taken in stretches: a running softmax. What a token
 * may not see adds zeros. So a token depends neither on other rows nor on columns that it may not see.
 */
#define COLUMNS_TOGETHER 256 /* columns whose scores and values stay in the first caches */

/* What a row of new tokens sees: token t the columns from[t] to to[t]; nothing where these are none. */
struct sight {
    const int32_t *from, *to;
    long first, last; /* of all of its tokens */
};

/* One head of the cache of one row, all tokens of the heads that ask. */
struct asking {
    const struct cache *cache;
    const struct sight *sight;
    long fresh; /* tokens */
    float scale;
    const float *sinks; /* of the heads that ask, or NULL */
    const char *keys, *values; /* at column 0 */
};

/* WIDE queries or fewer at a time: head and token of each, and their sums so far. */
struct queries {
    long count;
    int32_t from[WIDE] __attribute__((aligned(LINE))), to[WIDE] __attribute__((aligned(LINE)));
    float most[WIDE] __attribute__((aligned(LINE))), sum[WIDE] __attribute__((aligned(LINE)));
    long first, last;   /* columns that any of them sees */
    long latest, least; /* columns that all of them see */
};

static void look_from(const struct asking *a, long begin, struct queries *q)
{
    q->first = INT32_MAX, q->last = 0, q->latest = 0, q->least = INT32_MAX;
    for (long i = 0; i < WIDE; i++) {
        const long ask = begin + i < a->cache->groups * a->fresh ? begin + i : -1;
        const long token = ask < 0 ? 0 : ask % a->fresh;
        q->from[i] = ask < 0 ? INT32_MAX : a->sight->from[token];
        q->to[i] = ask < 0 ? 0 : a->sight->to[token];
        q->most[i] = ask < 0 || !a->sinks ? -INFINITY : a->sinks[ask / a->fresh];
        q->sum[i] = ask < 0 || !a->sinks ? 0 : 1;
        if (ask < 0)
            continue;
        q->count = i + 1;
        q->first = q->from[i] < q->first ? q->from[i] : q->first;
        q->last = q->to[i] > q->last ? q->to[i] : q->last;
        q->latest = q->from[i] > q->latest ? q->from[i] : q->latest;
        q->least = q->to[i] < q->least ? q->to[i] : q->least;
    }
}

/* scores [columns, vectors] of the stretch from column `at` on -> weights as pairs of columns [COLUMNS_TOGETHER / 2, vectors]. What
 * was summed up so far counts `less` of itself from now on. */
static INLINE void weigh(const struct asking *a, struct queries *q, long at, long columns, const int vectors, float *scores,
                         char *weights, float *less)
{
    const __m512 none = _mm512_set1_ps(-INFINITY), scale = _mm512_set1_ps(a->scale);
    const int all = at >= q->latest && at + columns <= q->least;
    for (int v = 0; v < vectors; v++) {
        const __m512i from = _mm512_load_si512(q->from + v * PAIR_LANES), to = _mm512_load_si512(q->to + v * PAIR_LANES);
        const __m512 before = _mm512_load_ps(q->most + v * PAIR_LANES);
        __m512 most = before;
        for (long c = 0; c < columns; c++) {
            float *here = scores + (c * vectors + v) * PAIR_LANES;
            __m512 score = _mm512_load_ps(here) * scale;
            if (!all) {
                const __m512i column = _mm512_set1_epi32((int)(at + c));
                const __mmask16 seen = _mm512_cmpge_epi32_mask(column, from) & _mm512_cmplt_epi32_mask(column, to);
                score = _mm512_mask_blend_ps(seen, none, score);
            }
            _mm512_store_ps(here, score);
            most = _mm512_max_ps(score, most); /* what is no number is left out here and shows in its weight */
        }
        const __m512 best = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(most, none, _CMP_EQ_OQ), most, _mm512_setzero_ps());
        const __m512 shrunk = (__m512)exponential_v4((floats_v4)(before - best));
        __m512 sum = _mm512_load_ps(q->sum + v * PAIR_LANES) * shrunk;
        for (long c = 0; c < COLUMNS_TOGETHER; c += 2) {
            if (c >= columns)
                break;
            const __m512 one = (__m512)exponential_v4((floats_v4)(_mm512_load_ps(scores + (c * vectors + v) * PAIR_LANES) - best));
            __m512 other = _mm512_setzero_ps();
            if (c + 1 < columns)
                other = (__m512)exponential_v4((floats_v4)(_mm512_load_ps(scores + ((c + 1) * vectors + v) * PAIR_LANES) - best));
            sum += one;
            sum += other;
            const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(one));
            const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(other));
            _mm512_store_si512(weights + (c / 2 * vectors + v) * LINE, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        }
        _mm512_store_ps(q->sum + v * PAIR_LANES, sum);
        _mm512_store_ps(q->most + v * PAIR_LANES, most);
        _mm512_store_ps(less + v * PAIR_LANES, shrunk);
    }
}

static INLINE void attend_wide(const struct asking *a, struct queries *q, const char *packed, const int vectors, float *room,
                               float *out)
{
    const struct cache *c = a->cache;
    const long lanes = vectors * PAIR_LANES, start = a->sight->first;
    float less[WIDE] __attribute__((aligned(LINE)));
    float *scores = room, *found = scores + COLUMNS_TOGETHER * WIDE;
    char *weights = (char *)(found + c->value_width * WIDE), *turned = weights + COLUMNS_TOGETHER / 2 * WIDE * 4;
    memset(out, 0, sizeof(float) * c->value_width * lanes);
    for (long at = start + (q->first - start) / COLUMNS_TOGETHER * COLUMNS_TOGETHER; at < q->last; at += COLUMNS_TOGETHER) {
        const long columns = q->last - at < COLUMNS_TOGETHER ? q->last - at : COLUMNS_TOGETHER;
        const struct matrix keys = {a->keys + at * c->key_column, NULL, columns, c->key_width, c->key_column / 2};
        const struct matrix values = {turned, NULL, c->value_width, (columns + 1) / 2 * 2, COLUMNS_TOGETHER};
        through_pairs(&keys, packed, vectors, scores, NULL);
        weigh(a, q, at, columns, vectors, scores, weights, less);
        turn_over(a->values + at * c->value_column, c->value_column, columns, c->value_width, COLUMNS_TOGETHER, turned);
        through_pairs(&values, weights, vectors, found, NULL);
        for (long d = 0; d < c->value_width; d++)
            for (int v = 0; v < vectors; v++) {
                float *here = out + d * lanes + v * PAIR_LANES;
                const __m512 kept = _mm512_load_ps(here) * _mm512_load_ps(less + v * PAIR_LANES);
                _mm512_store_ps(here, kept + _mm512_load_ps(found + d * lanes + v * PAIR_LANES));
            }
    }
    for (int v = 0; v < vectors; v++) {
        const __m512 sum = _mm512_load_ps(q->sum + v * PAIR_LANES);
        const __m512 share = _mm512_maskz_div_ps(_mm512_cmp_ps_mask(sum, _mm512_setzero_ps(), _CMP_NEQ_UQ), _mm512_set1_ps(1), sum);
        for (long d = 0; d < c->value_width; d++) {
            float *here = out + d * lanes + v * PAIR_LANES;
            _mm512_store_ps(here, _mm512_load_ps(here) * share);
        }
    }
}

/* Bytes that one thread needs: scores, sums of this stretch, weights, values turned over; all sums, queries packed. */
static long attend_bytes(const struct cache *c)
{
    const long values = c->value_width * (2 * WIDE * 4 + COLUMNS_TOGETHER * 2);
    return COLUMNS_TOGETHER * WIDE * (4 + 2) + values + c->key_width / 2 * WIDE * 4 + LINE;
}

/* One row's head of the cache: q [rows, fresh, heads * groups, key width] -> out, the same with the value width. */
static void attend_many(const struct cache *c, const struct sight *sight, long fresh, long row, long head, const char *q,
                        const char *keys, const char *values, float scale, char *out, char *room)
{
    const long asks = c->heads * c->groups, first = head * c->groups;
    const struct sight *mine = sight + row;
    float *sums = aligned((float *)room), *inside = sums + c->value_width * WIDE;
    char *packed = (char *)inside;
    inside += c->key_width / 2 * WIDE;
    const struct asking a = {c, mine, fresh, scale, c->sinks ? c->sinks + first : NULL,
                             keys + row * c->key_row + head * c->key_head, values + row * c->value_row + head * c->value_head};
    for (long begin = 0; begin < c->groups * fresh; begin += WIDE) {
        struct queries queries = {0};
        const char *inputs[WIDE];
        char *outputs[WIDE];
        look_from(&a, begin, &queries);
        for (long i = 0; i < queries.count; i++) {
            const long at = (row * fresh + (begin + i) % fresh) * asks + first + (begin + i) / fresh;
            inputs[i] = q + at * c->key_width * 2;
            outputs[i] = out + at * c->value_width * 2;
        }
        pack_rows(inputs, queries.count, c->key_width / 2, packed);
        switch (vectors_for(queries.count)) {
        case 1: attend_wide(&a, &queries, packed, 1, inside, sums); break;
        case 2: attend_wide(&a, &queries, packed, 2, inside, sums); break;
        case 3: attend_wide(&a, &queries, packed, 3, inside, sums); break;
        case 4: attend_wide(&a, &queries, packed, 4, inside, sums); break;
        }
        unpack_rows(sums, c->value_width, queries.count, BFLOAT16, outputs);
    }
}

/* The first column that a token sees and the end of those behind it; 0 where it sees others behind a gap. */
static int look_line(const char *mask, long columns, int32_t *from, int32_t *to)
{
    const char *one = memchr(mask, 1, columns), *end = one ? memchr(one, 0, mask + columns - one) : mask;
    *from = one ? (int32_t)(one - mask) : INT32_MAX;
    *to = end ? (int32_t)(end - mask) : (int32_t)columns;
    return !one || !end || !memchr(end, 1, mask + columns - end);
}

/* Which columns each of `fresh` tokens sees by its row of `mask` [fresh, columns], which has no gaps. Without a mask a token
 * sees all up to itself, the last of them all. */
static void look_all(const struct cache *c, long fresh, const char *mask, long token_step, struct sight *sight, int32_t *room)
{
    for (long row = 0; row < c->rows; row++) {
        int32_t *from = room + 2 * row * fresh, *to = from + fresh;
        long first = INT32_MAX, last = 0;
        for (long t = 0; t < fresh; t++) {
            from[t] = 0, to[t] = (int32_t)(c->columns - fresh + t + 1);
            if (mask)
                look_line(mask + row * c->mask_row + t * token_step, c->columns, from + t, to + t);
            first = from[t] < first ? from[t] : first;
            last = to[t] > last ? to[t] : last;
        }
        sight[row] = (struct sight){from, to, first < last ? first : 0, last};
    }
}
