/* The loops of products_scan.h for one instruction set; included with products_variant.h. */

/* Rows `rows` of a head's state [values, keys] take a token in and are asked: they fade by `decay`, `k` times each row's own
 * number is added, and their products with `q` are the answers. */
static INLINE void NAME(scan_rows)(float *state, long keys, const float *q, const float *k, float decay, const float *by,
                                   float *answers, const int rows)
{
    NAME(floats) sums[4];
    memset(sums, 0, sizeof sums);
    long i = 0;
    for (; i + LANES <= keys; i += LANES) {
        const NAME(floats) key = NAME(load)(k + i), asked = NAME(load)(q + i);
        for (int row = 0; row < rows; row++) {
            float *at = state + row * keys + i;
            const NAME(floats) now = NAME(load)(at) * decay + key * by[row];
            memcpy(at, &now, sizeof now);
            sums[row] += now * asked;
        }
    }
    for (int row = 0; row < rows; row++) {
        float all = NAME(sum)(sums[row]);
        for (long rest = i; rest < keys; rest++) {
            float *at = state + row * keys + rest;
            *at = *at * decay + k[rest] * by[row];
            all += *at * q[rest];
        }
        answers[row] = all;
    }
}

/* The tokens of a stretch, of which `t->beta` is how much each counts; x [tokens, values] -> out, `out_token` numbers apart. */
static void NAME(scan)(const struct told *t, float *state, long values, const float *x, float skip, float *out, long out_token)
{
    for (long token = 0; token < t->tokens; token++) {
        const float *q = t->q + token * t->keys, *k = t->k + token * t->keys, *given = x + token * values;
        float *to = out + token * out_token;
        for (long row = 0; row < values; row += 4) {
            const int rows = values - row < 4 ? (int)(values - row) : 4;
            float by[4], answers[4];
            for (int i = 0; i < rows; i++)
                by[i] = given[row + i] * t->beta[token];
            if (rows == 4)
                NAME(scan_rows)(state + row * t->keys, t->keys, q, k, t->decay[token], by, answers, 4);
            else
                for (int i = 0; i < rows; i++)
                    NAME(scan_rows)(state + (row + i) * t->keys, t->keys, q, k, t->decay[token], by + i, answers + i, 1);
            for (int i = 0; i < rows; i++)
                to[row + i] = answers[i] + skip * given[row + i];
        }
    }
}
