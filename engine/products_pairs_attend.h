/* Attention of single tokens over keys and values in bfloat16, with the pairs of products_pairs.h: eight columns of keys
 * are dotted with a query at a time, and sums over values stay in registers from the first column to the last.
 *
 * A score is summed in one order, whichever columns are beside it, and values in the order of the columns seen.
 */
#define ABREAST 8 /* columns of keys */
#define QUERIES 2 /* that share one reading of keys */
#define STRIP 4   /* vectors of floats: what of a value is summed up at a time */

#define OF_SIXTEEN(DO)                                                                                                 \
    DO(0, 0) DO(0, 1) DO(0, 2) DO(0, 3) DO(1, 0) DO(1, 1) DO(1, 2) DO(1, 3) DO(2, 0) DO(2, 1) DO(2, 2) DO(2, 3)        \
    DO(3, 0) DO(3, 1) DO(3, 2) DO(3, 3)

/* Scores of the columns `first` to first + ABREAST that are seen, of `rows` queries, one or two. */
static INLINE void scores_abreast(const struct cache *c, const struct seen *seen, long first, const uint16_t *const *q,
                                  const int rows, float *scores)
{
    const long some = seen->count - first < ABREAST ? seen->count - first : ABREAST, width = c->key_width;
#define BEGIN(i) /* behind the last column, that one again */                                                          \
    const char *const key##i = seen->keys + seen->columns[first + (i < some ? i : some - 1)] * c->key_column;          \
    __m512 one##i = _mm512_setzero_ps(), two##i = _mm512_setzero_ps();
    OF_EIGHT(BEGIN)
    for (long k = 0; k < width; k += PAIRED) {
        const __mmask32 left = left_of(width - k);
        const __m512bh here = (__m512bh)_mm512_maskz_loadu_epi16(left, q[0] + k);
        const __m512bh there = rows > 1 ? (__m512bh)_mm512_maskz_loadu_epi16(left, q[1] + k) : here;
#define ADD(i)                                                                                                         \
    {                                                                                                                  \
        __builtin_prefetch(key##i + k * 2 + AHEAD, 0, 1);                                                              \
        const __m512bh key = (__m512bh)_mm512_maskz_loadu_epi16(left, (const uint16_t *)key##i + k);                   \
        one##i = _mm512_dpbf16_ps(one##i, here, key);                                                                  \
        if (rows > 1)                                                                                                  \
            two##i = _mm512_dpbf16_ps(two##i, there, key);                                                             \
    }
        OF_EIGHT(ADD)
    }
    float found[QUERIES * ABREAST];
    sum_eight(one0, one1, one2, one3, one4, one5, one6, one7, found);
    if (rows > 1)
        sum_eight(two0, two1, two2, two3, two4, two5, two6, two7, found + ABREAST);
    for (int row = 0; row < rows; row++)
        for (long i = 0; i < some; i++)
            scores[row * c->room + first + i] = found[row * ABREAST + i] * seen->scale;
#undef BEGIN
#undef ADD
}

/* The part-th vector of a value, as floats. */
static INLINE __m512 value_at(const uint16_t *from, const int part, __mmask16 left)
{
    const __m256i narrow = _mm256_maskz_loadu_epi16(left, from + part * LONGEST_VECTOR);
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
}

/* to[row][at..] = the values seen, by weights[row], of `vectors` vectors; `left` are the numbers of the last of them. */
static INLINE void sum_values(const struct cache *c, const struct seen *seen, const char *values, const int vectors,
                              __mmask16 left, const float *weights, const int rows, float *const *to, long at)
{
    const long count = seen->count, room = c->room;
#define THERE(part) (part + 1 < vectors ? 0xffff : left)
#define BEGIN(row, part) __m512 sum##row##part = _mm512_setzero_ps();
#define ADD(row, part)                                                                                                 \
    if (row < rows && part < vectors)                                                                                  \
        sum##row##part = _mm512_fmadd_ps(_mm512_set1_ps(weights[row * room + i]), v##part, sum##row##part);
#define PUT(row, part)                                                                                                 \
    if (row < rows && part < vectors)                                                                                  \
        _mm512_mask_storeu_ps(to[row] + at + part * LONGEST_VECTOR, THERE(part), sum##row##part);
    OF_SIXTEEN(BEGIN)
    for (long i = 0; i < count; i++) {
        const uint16_t *from = (const uint16_t *)(values + seen->columns[i] * c->value_column);
        __builtin_prefetch((const char *)from + AHEAD, 0, 1);
        if (vectors > 2)
            __builtin_prefetch((const char *)from + AHEAD + LINE, 0, 1);
        const __m512 v0 = value_at(from, 0, THERE(0)), v1 = value_at(from, 1, vectors > 1 ? THERE(1) : 0);
        const __m512 v2 = value_at(from, 2, vectors > 2 ? THERE(2) : 0), v3 = value_at(from, 3, vectors > 3 ? THERE(3) : 0);
        OF_SIXTEEN(ADD)
    }
    OF_SIXTEEN(PUT)
#undef THERE
#undef BEGIN
#undef ADD
#undef PUT
}

typedef void (*values_t)(const struct cache *, const struct seen *, const char *, __mmask16, const float *, float *const *, long);

/* One function each, so that the sums stay in registers. */
#define VALUES(rows, vectors)                                                                                          \
    static __attribute__((noinline)) void values_##rows##_##vectors(const struct cache *c, const struct seen *seen,    \
                                                                    const char *values, __mmask16 left,                \
                                                                    const float *weights, float *const *to, long at)   \
    {                                                                                                                  \
        sum_values(c, seen, values, vectors, left, weights, rows, to, at);                                             \
    }
VALUES(1, 1) VALUES(1, 2) VALUES(1, 3) VALUES(1, 4) VALUES(2, 1) VALUES(2, 2) VALUES(2, 3) VALUES(2, 4)
VALUES(3, 1) VALUES(3, 2) VALUES(3, 3) VALUES(3, 4) VALUES(4, 1) VALUES(4, 2) VALUES(4, 3) VALUES(4, 4)
#undef VALUES

static const values_t values_of[TOGETHER][STRIP] = {
    {values_1_1, values_1_2, values_1_3, values_1_4},
    {values_2_1, values_2_2, values_2_3, values_2_4},
    {values_3_1, values_3_2, values_3_3, values_3_4},
    {values_4_1, values_4_2, values_4_3, values_4_4},
};

typedef void (*scores_t)(const struct cache *, const struct seen *, long, const uint16_t *const *, float *);

#define SCORES(rows)                                                                                                   \
    static __attribute__((noinline)) void scores_##rows(const struct cache *c, const struct seen *seen, long first,    \
                                                        const uint16_t *const *q, float *scores)                       \
    {                                                                                                                  \
        scores_abreast(c, seen, first, q, rows, scores);                                                               \
    }
SCORES(1) SCORES(2)
#undef SCORES

/* As `heads` of AVX-512, of at most TOGETHER rows; q [rows][key width] in bfloat16. */
static void heads_pairs(const struct cache *c, const struct seen *seen, const uint16_t *const *q, int rows, const float *sinks,
                        float *scores, float *const *to)
{
    static const scores_t scores_of[QUERIES] = {scores_1, scores_2};
    for (long first = 0; first < seen->count; first += ABREAST)
        for (int row = 0; row < rows; row += QUERIES)
            scores_of[rows - row > 1](c, seen, first, q + row, scores + row * c->room);
    for (int row = 0; row < rows; row++)
        softmax_v4(scores + row * c->room, seen->count, sinks ? sinks[row] : -INFINITY);
    for (long at = 0; at < c->value_width; at += STRIP * LONGEST_VECTOR) {
        const long width = c->value_width - at < STRIP * LONGEST_VECTOR ? c->value_width - at : STRIP * LONGEST_VECTOR;
        const long vectors = (width + LONGEST_VECTOR - 1) / LONGEST_VECTOR;
        const __mmask16 left = 0xffff >> (vectors * LONGEST_VECTOR - width);
        values_of[rows - 1][vectors - 1](c, seen, seen->values + at * 2, left, scores, to, at);
    }
}

static void attend_pairs(const struct cache *c, const struct seen *seen, int dtype, const float *const *q, float *scores,
                         float *const *to)
{
    if (dtype == FLOAT32) {
        attend_v4(c, seen, dtype, q, scores, to);
        return;
    }
    for (long row = 0; row < c->groups; row += TOGETHER)
        heads_pairs(c, seen, (const uint16_t *const *)q + row, c->groups - row < TOGETHER ? (int)(c->groups - row) : TOGETHER,
                    seen->sinks ? seen->sinks + row : NULL, scores, to + row);
}
