/* A state space (Mamba 2's), a token after the other: the state of a head, [values, keys], fades, takes the token in and answers.
 * Included by products.c. A row is the same in any batch and any stretch.
 */
struct scan {
    int dtype; /* of x, k and q */
    long rows, tokens, groups, heads, values, keys;
    long x_row, x_token, k_row, k_token, q_row, q_token; /* strides, in numbers */
    const char *x, *k, *q;
    const float *steps, *fading, *skip; /* [rows, tokens, heads], [heads], [heads] or NULL */
    float *state, *out;                 /* [rows, heads, values, keys], [rows, tokens, heads, values] */
};

static void scan_unit(int set, const void *job, long unit, float *room)
{
    const struct scan *s = job;
    const long row = unit / s->heads, head = unit % s->heads, size = size_of(s->dtype), lines = TOLD * s->keys;
    const long shared = head / (s->heads / s->groups) * s->keys;
    struct told t = {s->keys, 0, room, room + lines, NULL, room + 2 * lines, room + 2 * lines + TOLD};
    float *x = t.beta + TOLD, *state = s->state + unit * s->values * s->keys;
    const float skip = s->skip ? s->skip[head] : 0;
    for (long first = 0; first < s->tokens; first += TOLD) {
        t.tokens = s->tokens - first < TOLD ? s->tokens - first : TOLD;
        for (long token = 0; token < t.tokens; token++) {
            const long at = first + token;
            t.beta[token] = s->steps[(row * s->tokens + at) * s->heads + head];
            t.decay[token] = expf(t.beta[token] * s->fading[head]);
            widen(s->q + (row * s->q_row + at * s->q_token + shared) * size, s->dtype, s->keys, t.q + token * s->keys);
            widen(s->k + (row * s->k_row + at * s->k_token + shared) * size, s->dtype, s->keys, t.k + token * s->keys);
            widen(s->x + (row * s->x_row + at * s->x_token + head * s->values) * size, s->dtype, s->values, x + token * s->values);
        }
        sets[set].scan(&t, state, s->values, x, skip, s->out + ((row * s->tokens + first) * s->heads + head) * s->values,
                       s->heads * s->values);
    }
}

static PyObject *py_scan(PyObject *self, PyObject *args)
{
    int set, threads;
    struct scan s;
    unsigned long long x, k, q, steps, fading, skip, state, out;
    if (!PyArg_ParseTuple(args, "iiKKKKKKKK(llllll)(llllll)i", &set, &s.dtype, &x, &k, &q, &steps, &fading, &skip, &state, &out,
                          &s.rows, &s.tokens, &s.groups, &s.heads, &s.values, &s.keys, &s.x_row, &s.x_token, &s.k_row, &s.k_token,
                          &s.q_row, &s.q_token, &threads) || !check_set(set))
        return NULL;
    s.x = (const char *)x, s.k = (const char *)k, s.q = (const char *)q, s.steps = (const float *)steps;
    s.fading = (const float *)fading, s.skip = (const float *)skip, s.state = (float *)state, s.out = (float *)out;
    return each_head(set, scan_unit, &s, s.rows * s.heads, TOLD * (2 * s.keys + 2 + s.values), s.tokens * s.keys * s.values, threads);
}
