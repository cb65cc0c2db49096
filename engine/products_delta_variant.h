/* The loops of products_delta.h for one instruction set; included with products_variant.h. */

/* Columns of a state [keys, values], as many as `vectors` vectors, through the tokens of a stretch. They are read twice and
 * written once a token: nothing of one depends on another column. */
static INLINE void NAME(delta_columns)(const struct told *t, float *state, long values, const char *v, long v_token,
                                       const int dtype, float *out, const int vectors)
{
    const long size = dtype == FLOAT32 ? 4 : 2, keys = t->keys;
    for (long token = 0; token < t->tokens; token++) {
        const float *q = t->q + token * keys, *k = t->k + token * keys, *faded = t->faded + token * keys;
        const float *decay = t->decay + token * keys;
        NAME(floats) seen[2][4], answer[2][4], change[4];
        memset(seen, 0, sizeof seen);
        memset(answer, 0, sizeof answer);
        for (long i = 0; i < keys; i++)
            for (int part = 0; part < vectors; part++)
                seen[i & 1][part] += NAME(load)(state + i * values + part * LANES) * faded[i];
        for (int part = 0; part < vectors; part++)
            change[part] = (NAME(weights)(v + (token * v_token + part * LANES) * size, dtype) - (seen[0][part] + seen[1][part])) *
                           t->beta[token];
        for (long i = 0; i < keys; i++)
            for (int part = 0; part < vectors; part++) {
                float *at = state + i * values + part * LANES;
                const NAME(floats) now = NAME(load)(at) * decay[i] + change[part] * k[i];
                memcpy(at, &now, sizeof now);
                answer[i & 1][part] += now * q[i];
            }
        for (int part = 0; part < vectors; part++) {
            const NAME(floats) all = answer[0][part] + answer[1][part];
            memcpy(out + token * values + part * LANES, &all, sizeof all);
        }
    }
}

static INLINE void NAME(delta_rest)(const struct told *t, float *state, long values, const char *v, long v_token,
                                    const int dtype, float *out)
{
    const long size = dtype == FLOAT32 ? 4 : 2, keys = t->keys;
    for (long token = 0; token < t->tokens; token++) {
        float seen = 0, answer = 0;
        for (long i = 0; i < keys; i++)
            seen += state[i * values] * t->faded[token * keys + i];
        const float change = (number(v + token * v_token * size, dtype) - seen) * t->beta[token];
        for (long i = 0; i < keys; i++) {
            float *at = state + i * values;
            *at = *at * t->decay[token * keys + i] + change * t->k[token * keys + i];
            answer += *at * t->q[token * keys + i];
        }
        out[token * values] = answer;
    }
}

static INLINE void NAME(delta_all)(const struct told *t, float *state, long values, const char *v, long v_token,
                                   const int dtype, float *out)
{
    const long size = dtype == FLOAT32 ? 4 : 2;
    long column = 0;
    for (; column + 4 * LANES <= values; column += 4 * LANES)
        NAME(delta_columns)(t, state + column, values, v + column * size, v_token, dtype, out + column, 4);
    for (; column + LANES <= values; column += LANES)
        NAME(delta_columns)(t, state + column, values, v + column * size, v_token, dtype, out + column, 1);
    for (; column < values; column++)
        NAME(delta_rest)(t, state + column, values, v + column * size, v_token, dtype, out + column);
}

static void NAME(delta)(const struct told *t, float *state, long values, const char *v, long v_token, int dtype, float *out)
{
    if (dtype == FLOAT32)
        NAME(delta_all)(t, state, values, v, v_token, FLOAT32, out);
    else
        NAME(delta_all)(t, state, values, v, v_token, BFLOAT16, out);
}
