/* Linear attention by the gated delta rule, a token after the other: the state of a head, [keys, values], fades, is told how
 * far its answer to the key is from the value, and answers the query. Included by products.c.
 *
 * The numbers of a token that all columns of the state share are laid out first, for a stretch of tokens; then its columns go
 * through the stretch a few at a time, so that they stay in the first cache. A row is the same in any batch and any stretch.
 */
struct delta {
    int dtype, each; /* `each`: a decay for every number of a key, not one a head */
    long rows, tokens, key_heads, heads, keys, values;
    long q_row, q_token, k_row, k_token, v_row, v_token; /* strides, in numbers */
    float scale, least;                                   /* of queries; of the lengths that q and k are divided by, < 0 for none */
    const char *q, *k, *v;
    const float *decay, *beta; /* logarithms [rows, tokens, heads(, keys)], [rows, tokens, heads] */
    float *state;              /* [rows, heads, keys, values] */
    char *out;                 /* [rows, tokens, heads, values] */
};

/* `run` for every head of every row; it takes `numbers` floats of room, and `work` numbers of the state go by for each. */
static PyObject *each_head(int set, void (*run)(int, const void *, long, float *), const void *job, long heads, long numbers,
                           long work, int threads)
{
    const long piece = (numbers + LINE / 4 - 1) / (LINE / 4) * (LINE / 4);
    threads = threads_for(4 * heads * work, threads);
    float *room = malloc(sizeof(float) * piece * threads + LINE);
    if (!room)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        for (long head = share(heads, part, parts); head < share(heads, part + 1, parts); head++)
            run(set, job, head, aligned(room) + part * piece);
    }
    Py_END_ALLOW_THREADS
    free(room);
    Py_RETURN_NONE;
}

static void take_length(const char *from, int dtype, long width, float scale, float least, float *to)
{
    float squares[LONGEST_VECTOR] = {0}, sum = 0;
    widen(from, dtype, width, to);
    for (long i = 0; i < width; i++)
        squares[i % LONGEST_VECTOR] += to[i] * to[i];
    for (int lane = 0; lane < LONGEST_VECTOR; lane++)
        sum += squares[lane];
    const float by = least < 0 ? scale : scale / sqrtf(sum + least);
    for (long i = 0; i < width; i++)
        to[i] *= by;
}

/* What `tokens` tokens from `first` on tell one head's state. */
static void tell(const struct delta *d, long row, long head, long first, struct told *t)
{
    const long size = size_of(d->dtype), keys = d->keys, shared = head / (d->heads / d->key_heads) * keys;
    for (long token = 0; token < t->tokens; token++) {
        const long at = first + token, one = (row * d->tokens + at) * d->heads + head;
        float *k = t->k + token * keys, *faded = t->faded + token * keys, *decay = t->decay + token * keys;
        take_length(d->q + (row * d->q_row + at * d->q_token + shared) * size, d->dtype, keys, d->scale, d->least, t->q + token * keys);
        take_length(d->k + (row * d->k_row + at * d->k_token + shared) * size, d->dtype, keys, 1, d->least, k);
        const float alike = d->each ? 0 : expf(d->decay[one]);
        for (long i = 0; i < keys; i++) {
            decay[i] = d->each ? expf(d->decay[one * keys + i]) : alike;
            faded[i] = decay[i] * k[i];
        }
        t->beta[token] = d->beta[one];
    }
}

static void delta_unit(int set, const void *job, long unit, float *room)
{
    const struct delta *d = job;
    const long row = unit / d->heads, head = unit % d->heads, size = size_of(d->dtype), lines = TOLD * d->keys;
    struct told t = {d->keys, 0, room, room + lines, room + 2 * lines, room + 3 * lines, room + 4 * lines};
    float *found = t.beta + TOLD, *state = d->state + unit * d->keys * d->values;
    for (long first = 0; first < d->tokens; first += TOLD) {
        t.tokens = d->tokens - first < TOLD ? d->tokens - first : TOLD;
        tell(d, row, head, first, &t);
        sets[set].delta(&t, state, d->values, d->v + (row * d->v_row + first * d->v_token + head * d->values) * size, d->v_token,
                        d->dtype, found);
        for (long token = 0; token < t.tokens; token++)
            narrow(found + token * d->values, d->dtype, d->values,
                   d->out + ((row * d->tokens + first + token) * d->heads + head) * d->values * size);
    }
}

static PyObject *py_delta(PyObject *self, PyObject *args)
{
    int set, threads;
    struct delta d;
    unsigned long long q, k, v, decay, beta, state, out;
    if (!PyArg_ParseTuple(args, "iiiKKKKKKK(llllll)(llllll)ffi", &set, &d.dtype, &d.each, &q, &k, &v, &decay, &beta, &state, &out,
                          &d.rows, &d.tokens, &d.key_heads, &d.heads, &d.keys, &d.values, &d.q_row, &d.q_token, &d.k_row, &d.k_token,
                          &d.v_row, &d.v_token, &d.scale, &d.least, &threads) || !check_set(set))
        return NULL;
    d.q = (const char *)q, d.k = (const char *)k, d.v = (const char *)v, d.out = (char *)out;
    d.decay = (const float *)decay, d.beta = (const float *)beta, d.state = (float *)state;
    return each_head(set, delta_unit, &d, d.rows * d.heads, TOLD * (4 * d.keys + 1 + d.values), d.tokens * d.keys * d.values, threads);
}
