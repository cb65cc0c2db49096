/* A decoder layer for a single new token of few rows in two calls: from its input to the router's choice, and from there to
 * its output. Between the two Python looks the chosen experts' slots up.
 *
 * Every number is rounded where the modules of transformers round it: a norm, attention's output, the sums of the residual
 * stream, the router's logits.
 */

/* What a router makes of its logits: the top_k of their softmax. */
struct choice {
    const char *weights; /* [experts, hidden]; NULL where nothing is chosen here */
    long experts, top_k;
    int renormalise, dtype; /* of the chosen weights */
    float scale;
};

struct layer {
    struct block block;
    struct norm before, after; /* of attention */
    struct choice choice;
};

/* Addresses of one call, rows one after the other: x, after attention, the same normed [rows, hidden]; forbidden bytes
 * [1 or rows, experts] or NULL; weights and index of the free choice [rows, top_k] or NULL; weights and index of the choice;
 * how many experts a row is routed to [rows], NULL: top_k. */
struct call {
    const char *x, *cos, *sin, *mask, *forbidden;
    char *keys, *values, *middle, *normed, *free_weights, *weights;
    int64_t *free_index, *index;
    const int64_t *calls;
    long position_row, forbidden_row;
};

/* to = one + other */
static void add(const char *one, const char *other, int dtype, long count, char *to)
{
    const long size = dtype == FLOAT32 ? 4 : 2;
    for (long i = 0; i < count; i++)
        put(to + i * size, number(one + i * size, dtype) + number(other + i * size, dtype), dtype);
}

#define TAKEN -1.0f /* in place of a share, which is no less than 0: of what is forbidden or chosen already */

/* logits [experts] -> their softmax over what is not forbidden, in place. */
static void shares(const struct choice *c, float *logits, const char *forbidden)
{
    float most = -INFINITY, sum = 0;
    for (long e = 0; e < c->experts; e++)
        if (!(forbidden && forbidden[e]) && logits[e] > most)
            most = logits[e];
    for (long e = 0; e < c->experts; e++)
        if (forbidden && forbidden[e])
            logits[e] = TAKEN;
        else
            sum += logits[e] = expf(logits[e] - most);
    for (long e = 0; e < c->experts; e++)
        if (logits[e] != TAKEN)
            logits[e] /= sum;
}

/* The `calls` largest of the shares, the first of equals first; the places that none is left for, and those after `calls`,
 * are nobody's, whose number is `experts`. */
static void choose(const struct choice *c, float *share, long calls, int64_t *index, char *weights)
{
    const long size = c->dtype == FLOAT32 ? 4 : 2;
    float sum = 0, chosen[c->top_k];
    for (long place = 0; place < c->top_k; place++) {
        long best = -1;
        for (long e = 0; e < c->experts && place < calls; e++)
            if (share[e] != TAKEN && (best < 0 || share[e] > share[best]))
                best = e;
        index[place] = best < 0 ? c->experts : best;
        chosen[place] = best < 0 ? 0 : share[best];
        sum += chosen[place];
        if (best >= 0)
            share[best] = TAKEN;
    }
    for (long place = 0; place < c->top_k; place++)
        put(weights + place * size, (c->renormalise ? chosen[place] / sum : chosen[place]) * c->scale, c->dtype);
}

/* The router's logits of one row, rounded, then the choice among all experts and the one among those that are allowed. */
static void route(const struct choice *c, int dtype, const char *logits, long row, const struct call *to, float *share)
{
    const long at = row * c->top_k, weight = c->dtype == FLOAT32 ? 4 : 2;
    logits += row * c->experts * (dtype == FLOAT32 ? 4 : 2);
    if (to->free_weights) {
        widen(logits, dtype, c->experts, share);
        shares(c, share, NULL);
        choose(c, share, c->top_k, to->free_index + at, to->free_weights + at * weight);
    }
    widen(logits, dtype, c->experts, share);
    shares(c, share, to->forbidden ? to->forbidden + row * to->forbidden_row : NULL);
    choose(c, share, to->calls ? to->calls[row] : c->top_k, to->index + at, to->weights + at * weight);
}

/* 0 where there is no memory. */
static int route_all(int set, const struct layer *l, const struct call *to, long rows, int threads)
{
    const struct choice *c = &l->choice;
    const long hidden = l->before.width;
    const struct matrix m = {c->weights, NULL, c->experts, hidden, hidden};
    float *room = malloc(LINE + sizeof(float) * (rows * (pitch(hidden) + 2 * c->experts) + c->experts) + 2 * sizeof(void *) * rows);
    if (!room)
        return 0;
    const float **inputs = (const float **)room;
    float *share = (float *)(inputs + 2 * rows);
    char *logits = (char *)(share + c->experts);
    product(set, &m, l->block.dtype, to->normed, rows, logits, (float *)logits + rows * c->experts, inputs,
            (float **)(inputs + rows), threads);
    for (long row = 0; row < rows; row++)
        route(c, l->block.dtype, logits, row, to, share);
    free(room);
    return 1;
}

/* 0 where there is no memory. */
static int run_layer(int set, const struct layer *l, struct cache *c, const struct call *to, int threads)
{
    const int dtype = l->block.dtype;
    const long count = c->rows * l->before.width;
    norm_rows(&l->before, dtype, to->x, c->rows, to->normed);
    if (!run_block(set, &l->block, c, to->normed, to->cos, to->sin, to->position_row, to->keys, to->values, to->mask, to->middle,
                   threads))
        return 0;
    add(to->x, to->middle, dtype, count, to->middle);
    norm_rows(&l->after, dtype, to->middle, c->rows, to->normed);
    return !l->choice.weights || route_all(set, l, to, c->rows, threads);
}

static int parse_layer(PyObject *fields, struct layer *l)
{
    unsigned long long before, after, router;
    struct choice *c = &l->choice;
    if (!PyArg_ParseTuple(fields, "KfKfKlliif", &before, &l->before.least, &after, &l->after.least, &router, &c->experts,
                          &c->top_k, &c->renormalise, &c->dtype, &c->scale))
        return 0;
    l->before.weights = (const char *)before;
    l->after.weights = (const char *)after;
    l->before.width = l->after.width = l->block.q.columns;
    c->weights = (const char *)router;
    return 1;
}

static int parse_call(PyObject *states, PyObject *routing, struct call *to, int *threads)
{
    unsigned long long x, middle, normed, cos, sin, keys, values, mask, forbidden, free_weights, free_index, calls, weights;
    if (!PyArg_ParseTuple(states, "KKKKKlKKKi", &x, &middle, &normed, &cos, &sin, &to->position_row, &keys, &values, &mask,
                          threads) ||
        !PyArg_ParseTuple(routing, "KlKKKK", &forbidden, &to->forbidden_row, &free_weights, &free_index, &calls, &weights))
        return 0;
    to->x = (const char *)x, to->cos = (const char *)cos, to->sin = (const char *)sin, to->mask = (const char *)mask;
    to->forbidden = (const char *)forbidden;
    to->middle = (char *)middle, to->normed = (char *)normed, to->keys = (char *)keys, to->values = (char *)values;
    to->free_weights = (char *)free_weights, to->free_index = (int64_t *)free_index, to->weights = (char *)weights;
    to->calls = (const int64_t *)calls;
    return 1;
}

static PyObject *listed(const int64_t *index, long count)
{
    PyObject *list = PyList_New(count);
    for (long at = 0; list && at < count; at++) {
        PyObject *number = PyLong_FromLong(index[at]);
        if (number)
            PyList_SET_ITEM(list, at, number);
        else
            Py_CLEAR(list);
    }
    return list;
}

static PyObject *py_layer(PyObject *self, PyObject *args)
{
    int set, threads, had_room;
    struct layer l;
    struct cache c;
    struct call to;
    PyObject *block, *layer, *states, *cache, *routing;
    if (!PyArg_ParseTuple(args, "iO!O!O!O!O!", &set, &PyTuple_Type, &block, &PyTuple_Type, &layer, &PyTuple_Type, &states,
                          &PyTuple_Type, &cache, &PyTuple_Type, &routing) ||
        !check_set(set) || !parse_block(block, &l.block) || !parse_layer(layer, &l) || !parse_cache(cache, &l.block, &c) ||
        !parse_call(states, routing, &to, &threads))
        return NULL;
    const long choices = l.choice.weights ? c.rows * l.choice.top_k : 0;
    int64_t index[choices + 1];
    to.index = index;
    Py_BEGIN_ALLOW_THREADS
    had_room = run_layer(set, &l, &c, &to, threads);
    Py_END_ALLOW_THREADS
    if (!had_room)
        return PyErr_NoMemory();
    if (!choices)
        Py_RETURN_NONE;
    return listed(index, choices);
}

/* out [tokens, hidden] = the weighted sum of a token's experts, and what of `every` is its. 0 with an error set. */
static int sum_experts(int set, const struct layout *l, const char *bank, const char *x, long tokens, PyObject *slots,
                       const char *weights, int weights_dtype, const struct sharing *every, char *out, int threads)
{
    float *y = malloc(sizeof(float) * PyList_GET_SIZE(slots) * l->hidden);
    int done = y != NULL;
    if (!done)
        PyErr_NoMemory();
    if (done)
        done = run_experts(set, l, bank, x, tokens, slots, every, y, threads);
    if (done) {
        done = sum_up(y, slots, weights, weights_dtype, out, l->dtype, tokens, l->hidden);
        if (!done)
            PyErr_NoMemory();
    }
    free(y);
    if (done)
        add_shared(every, out);
    return done;
}

/* out [tokens, hidden] = middle + (a token's experts, weighted, + the shared one). */
static PyObject *py_onto(PyObject *self, PyObject *args)
{
    int set, threads, weights_dtype;
    unsigned long long bank, x, weights, middle, out;
    long tokens, top_k;
    struct layout l;
    struct shared s;
    struct sharing every;
    PyObject *slots, *shared;
    if (!PyArg_ParseTuple(args, "i" LAYOUT "KKllO!KiOKKi", &set, FIELDS(l), &bank, &x, &tokens, &top_k, &PyList_Type,
                          &slots, &weights, &weights_dtype, &shared, &middle, &out, &threads) ||
        !check_set(set) || !check_slots(slots, tokens, top_k) || !parse_shared(shared, &s))
        return NULL;
    char *room = lay_out_shared(&every, &s, tokens);
    if (!room)
        return PyErr_NoMemory();
    const int done = sum_experts(set, &l, (const char *)bank, (const char *)x, tokens, slots, (const char *)weights,
                                 weights_dtype, &every, (char *)out, threads);
    free(room);
    if (!done)
        return NULL;
    add((const char *)middle, (const char *)out, l.dtype, tokens * l.hidden, (char *)out);
    Py_RETURN_NONE;
}

/* out [tokens, hidden] = what the shared expert of a layer adds to the chosen ones: for when these come one by one. */
static PyObject *py_shared(PyObject *self, PyObject *args)
{
    int set, threads;
    unsigned long long x, out;
    long tokens;
    PyObject *shared;
    struct shared s;
    struct sharing every;
    if (!PyArg_ParseTuple(args, "iO!KlKi", &set, &PyTuple_Type, &shared, &x, &tokens, &out, &threads) || !check_set(set) ||
        !parse_shared(shared, &s))
        return NULL;
    const long hidden = s.inside.hidden, nobody = 0;
    char *room = lay_out_shared(&every, &s, tokens);
    float *wide = malloc(LINE + sizeof(float) * tokens * pitch(hidden));
    const int had_room = room && wide;
    if (had_room) {
        const struct work w = {.units = 0, .start = &nobody, .every = &every};
        Py_BEGIN_ALLOW_THREADS
        take(set, (const char *)x, s.inside.dtype, tokens, hidden, aligned(wide));
        take_in(&every, aligned(wide));
        run(set, &s.inside, &w, threads);
        memset((char *)out, 0, tokens * hidden * (s.inside.dtype == FLOAT32 ? 4 : 2));
        add_shared(&every, (char *)out);
        Py_END_ALLOW_THREADS
    }
    free(wide);
    free(room);
    if (!had_room)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}
