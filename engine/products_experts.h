/* The experts of an MoE layer for few tokens: each token's own, in the bank's slots, and how their outputs are summed up.
 * Included by products.c.
 */
/* Work of one call: `units` experts, expert u has the pairs order[start[u]] to order[start[u + 1]]. */
struct work {
    long units;
    const long *start;
    const char **slots;
    const float **inputs; /* [pairs] rows of x, in this order */
    float **inner;        /* [pairs] */
    float **outputs;      /* [pairs] */
    const struct sharing *every;
};

/* Each expert's rows are split among the threads alike, so all of them end together whatever the experts hit. */
static void run(int set, const struct layout *l, const struct work *w, int threads)
{
    const multiply_t multiply = sets[set].multiply;
    const long size = l->dtype == FLOAT32 ? 4 : 2;
    threads = threads_for(w->units * l->inner * l->hidden * (2 + l->gated) * size + shared_bytes(w->every), threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        for (long u = 0; u < w->units; u++) {
            const struct matrix up = up_of(l, w->slots[u]);
            const long at = w->start[u], pairs = w->start[u + 1] - at;
            multiply(&up, l->dtype, w->inputs + at, pairs, w->inner + at, share(up.rows, part, parts),
                     share(up.rows, part + 1, parts));
        }
        shared_in(multiply, w->every, part, parts);
#pragma omp barrier
        const long all = w->start[w->units];
        for (long pair = share(all, part, parts); pair < share(all, part + 1, parts); pair++)
            sets[set].activate(l, w->inner[pair]);
        activate_shared(sets[set].activate, w->every, part, parts);
#pragma omp barrier
        for (long u = 0; u < w->units; u++) {
            const struct matrix down = down_of(l, w->slots[u]);
            const long at = w->start[u], pairs = w->start[u + 1] - at;
            multiply(&down, l->dtype, (const float *const *)w->inner + at, pairs, w->outputs + at,
                     share(down.rows, part, parts), share(down.rows, part + 1, parts));
        }
        shared_out(multiply, w->every, part, parts);
    }
}

static int by_slot(const void *a, const void *b)
{
    const int64_t x = *(const int64_t *)a, y = *(const int64_t *)b;
    return (x > y) - (x < y);
}

/* `keys` are slot << 32 | pair, of the pairs that have a slot: pairs of one expert become neighbours. */
static long sorted_pairs(PyObject *slots, int64_t *keys)
{
    const Py_ssize_t pairs = PyList_GET_SIZE(slots);
    long found = 0;
    for (Py_ssize_t pair = 0; pair < pairs; pair++) {
        const long slot = PyLong_AsLong(PyList_GET_ITEM(slots, pair));
        if (slot == -1 && PyErr_Occurred())
            return -1;
        if (slot >= 0)
            keys[found++] = (int64_t)slot << 32 | pair;
    }
    qsort(keys, found, sizeof *keys, by_slot);
    return found;
}

/* Room for one call, in one piece: pointers first, then floats. */
static char *lay_out(struct work *w, const struct layout *l, long tokens, long pairs, float **wide, int64_t **keys,
                     float **inner)
{
    const long columns = pitch(l->inner * (1 + l->gated));
    char *room = malloc(pairs * (6 * 8 + 4 * columns) + 8 + LINE + 4 * tokens * pitch(l->hidden));
    if (!room)
        return NULL;
    *keys = (int64_t *)room;
    w->slots = (const char **)(*keys + pairs);
    w->inputs = (const float **)(w->slots + pairs);
    w->inner = (float **)(w->inputs + pairs);
    w->outputs = w->inner + pairs;
    long *start = (long *)(w->outputs + pairs);
    w->start = start;
    *inner = aligned((float *)(start + pairs + 1));
    *wide = *inner + pairs * columns;
    return room;
}

/* Fills `w` from the sorted keys: which expert has which pairs, and where their numbers are. */
static void assign(struct work *w, const struct layout *l, const char *bank, const int64_t *keys, long pairs, long top_k,
                   const float *x, float *inner, float *y)
{
    long *start = (long *)w->start;
    w->units = 0;
    for (long at = 0; at < pairs; at++) {
        const long slot = keys[at] >> 32, pair = keys[at] & 0xffffffff;
        if (!at || slot != keys[at - 1] >> 32) {
            w->slots[w->units] = bank + slot * l->slot_bytes;
            start[w->units++] = at;
        }
        w->inputs[at] = x + pair / top_k * pitch(l->hidden);
        w->inner[at] = inner + at * pitch(l->inner * (1 + l->gated));
        w->outputs[at] = y + pair * l->hidden;
    }
    start[w->units] = pairs;
}

/* The experts in `slots` of x [tokens, hidden] -> y f32 [tokens x experts a token, hidden], and what of `every` is every
 * token's. 0 with an error set. */
static int run_experts(int set, const struct layout *l, const char *bank, const char *x, long tokens, PyObject *slots,
                       const struct sharing *every, float *y, int threads)
{
    struct work w;
    float *wide, *inner;
    int64_t *keys;
    const long top_k = PyList_GET_SIZE(slots) / tokens;
    char *room = lay_out(&w, l, tokens, tokens * top_k, &wide, &keys, &inner);
    if (!room) {
        PyErr_NoMemory();
        return 0;
    }
    const long pairs = sorted_pairs(slots, keys);
    if (pairs >= 0) {
        Py_BEGIN_ALLOW_THREADS
        take(set, x, l->dtype, tokens, l->hidden, wide);
        assign(&w, l, bank, keys, pairs, top_k, wide, inner, y);
        take_in(every, wide);
        w.every = every;
        run(set, l, &w, threads);
        Py_END_ALLOW_THREADS
    }
    free(room);
    return pairs >= 0;
}

static int check_slots(PyObject *slots, long tokens, long top_k)
{
    if (PyList_GET_SIZE(slots) == tokens * top_k)
        return 1;
    PyErr_Format(PyExc_ValueError, "%zd slots for %ld tokens x %ld experts", PyList_GET_SIZE(slots), tokens, top_k);
    return 0;
}

static PyObject *py_experts(PyObject *self, PyObject *args)
{
    int set, threads;
    unsigned long long bank, x, y;
    long tokens, top_k;
    struct layout l;
    PyObject *slots;
    const struct sharing none = {0};
    if (!PyArg_ParseTuple(args, "i" LAYOUT "KKllO!Ki", &set, FIELDS(l), &bank, &x, &tokens, &top_k,
                          &PyList_Type, &slots, &y, &threads) || !check_set(set) || !check_slots(slots, tokens, top_k))
        return NULL;
    if (!run_experts(set, &l, (const char *)bank, (const char *)x, tokens, slots, &none, (float *)y, threads))
        return NULL;
    Py_RETURN_NONE;
}

/* out [tokens, hidden] = the sum over a token's experts of weight x output, in the router's order. 0 where there is no
 * memory. */
static int sum_up(const float *y, PyObject *slots, const char *weights, int weights_dtype, char *out, int dtype, long tokens,
                  long hidden)
{
    const long top_k = PyList_GET_SIZE(slots) / tokens, size = dtype == FLOAT32 ? 4 : 2;
    float *sum = malloc(sizeof(float) * hidden);
    if (!sum)
        return 0;
    for (long token = 0; token < tokens; token++) {
        memset(sum, 0, sizeof(float) * hidden);
        for (long pair = token * top_k; pair < (token + 1) * top_k; pair++) {
            if (PyLong_AsLong(PyList_GET_ITEM(slots, pair)) < 0)
                continue;
            const float weight = number(weights + pair * (weights_dtype == FLOAT32 ? 4 : 2), weights_dtype);
            const float *from = y + pair * hidden;
            for (long i = 0; i < hidden; i++)
                sum[i] += weight * from[i];
        }
        narrow(sum, dtype, hidden, out + token * hidden * size);
    }
    free(sum);
    return 1;
}

static PyObject *py_combine(PyObject *self, PyObject *args)
{
    int dtype, weights_dtype;
    unsigned long long y, weights, out;
    long tokens, hidden;
    PyObject *slots;
    if (!PyArg_ParseTuple(args, "KO!KiKill", &y, &PyList_Type, &slots, &weights, &weights_dtype, &out, &dtype, &tokens,
                          &hidden))
        return NULL;
    if (!sum_up((const float *)y, slots, (const char *)weights, weights_dtype, (char *)out, dtype, tokens, hidden))
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}
