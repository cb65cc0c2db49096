/* Many rows by AVX-512 BF16: what Python calls. Each function says how many bytes of room it needs where it was given fewer,
 * and has then done nothing.
 */

static PyObject *py_wide(PyObject *self, PyObject *args)
{
    int threads;
    unsigned long long x, weights, bias, y, room;
    long rows, size;
    struct matrix m = {0};
    if (!PyArg_ParseTuple(args, "KKKKllllKli", &x, &weights, &bias, &y, &rows, &m.rows, &m.columns, &m.stride, &room, &size,
                          &threads))
        return NULL;
    m.weights = (const char *)weights;
    m.bias = (const char *)bias;
    const long needed = packed_bytes(rows, m.columns);
    if (needed > size)
        return PyLong_FromLong(needed);
    Py_BEGIN_ALLOW_THREADS
    threads = threads_for(m.rows * m.columns * 2, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        pack_wide((const char *)x, rows, m.columns, m.columns * 2, (char *)room);
        multiply_wide(&m, (const char *)room, rows, BFLOAT16, (char *)y, m.rows * 2);
    }
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(0);
}

static long attend_prompt(const struct cache *c, long fresh, const char *q, const char *keys, const char *values,
                          const char *mask, long token_step, float scale, char *out, char *room, long size, int threads)
{
    struct arena a = {room, 0};
    const long piece = attend_bytes(c) + LINE;
    char *pieces = carve(&a, piece * threads);
    struct sight *sight = carve(&a, c->rows * sizeof *sight);
    int32_t *seen = carve(&a, 2 * c->rows * fresh * sizeof *seen);
    if (a.used > size)
        return a.used;
    look_all(c, fresh, mask, token_step, sight, seen);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (long unit = 0; unit < c->rows * c->heads; unit++)
        attend_many(c, sight, fresh, unit / c->heads, unit % c->heads, q, keys, values, scale, out,
                    pieces + piece * omp_get_thread_num());
    return 0;
}

static PyObject *py_attend_many(PyObject *self, PyObject *args)
{
    int threads;
    float scale;
    long fresh, token_step, size, needed;
    unsigned long long q, keys, values, mask, out, sinks, room;
    struct cache c;
    if (!PyArg_ParseTuple(args, "KKKKKKfll(lllllllllllll)Kli", &q, &keys, &values, &mask, &sinks, &out, &scale, &fresh,
                          &token_step, &c.rows, &c.heads, &c.groups, &c.columns, &c.key_width, &c.value_width, &c.key_row,
                          &c.key_head, &c.key_column, &c.value_row, &c.value_head, &c.value_column, &c.mask_row, &room, &size,
                          &threads))
        return NULL;
    c.sinks = (const float *)sinks;
    Py_BEGIN_ALLOW_THREADS
    needed = attend_prompt(&c, fresh, (const char *)q, (const char *)keys, (const char *)values, (const char *)mask, token_step,
                           scale, (char *)out, (char *)room, size, threads);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(needed);
}

static PyObject *py_prompt(PyObject *self, PyObject *args)
{
    int threads;
    struct layer l;
    struct cache c;
    struct call to;
    struct prompt p = {.layer = &l, .cache = &c, .to = &to};
    unsigned long long valid, index, room;
    long size, needed;
    PyObject *block, *layer, *states, *cache, *routing;
    if (!PyArg_ParseTuple(args, "O!O!O!O!O!(lllKKiKl)", &PyTuple_Type, &block, &PyTuple_Type, &layer, &PyTuple_Type, &states,
                          &PyTuple_Type, &cache, &PyTuple_Type, &routing, &p.fresh, &p.position_token, &p.mask_token, &valid,
                          &index, &p.routed, &room, &size) ||
        !parse_block(block, &l.block) || !parse_layer(layer, &l) || !parse_cache(cache, &l.block, &c) ||
        !parse_call(states, routing, &to, &threads))
        return NULL;
    p.tokens = c.rows * p.fresh;
    p.valid = (const char *)valid;
    to.index = (int64_t *)index;
    Py_BEGIN_ALLOW_THREADS
    needed = run_prompt(&p, (char *)room, size, threads);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(needed);
}

static PyObject *py_ending(PyObject *self, PyObject *args)
{
    int threads;
    unsigned long long y, index, weights, x, middle, out, room;
    long size, needed;
    struct shared s;
    struct ending e = {.shared = &s};
    PyObject *shared;
    if (!PyArg_ParseTuple(args, "KKlKiKOKKlllKli", &y, &index, &e.nobody, &weights, &e.weights_dtype, &x, &shared, &middle, &out, &e.tokens,
                          &e.top_k, &e.hidden, &room, &size, &threads) || !parse_shared(shared, &s))
        return NULL;
    e.y = (const float *)y, e.index = (const int64_t *)index, e.weights = (const char *)weights, e.x = (const char *)x;
    e.middle = (const char *)middle, e.out = (char *)out;
    Py_BEGIN_ALLOW_THREADS
    needed = run_ending(&e, (char *)room, size, threads);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(needed);
}

/* Whether every token of a mask [rows, tokens, columns] of bytes sees columns without others between that it does not. */
static PyObject *py_clear(PyObject *self, PyObject *args)
{
    unsigned long long mask;
    long fresh, token_step;
    struct cache c;
    if (!PyArg_ParseTuple(args, "Klllll", &mask, &c.rows, &fresh, &c.columns, &c.mask_row, &token_step))
        return NULL;
    for (long row = 0; row < c.rows; row++)
        for (long t = 0; t < fresh; t++) {
            int32_t from, to;
            if (!look_line((const char *)mask + row * c.mask_row + t * token_step, c.columns, &from, &to))
                Py_RETURN_FALSE;
        }
    Py_RETURN_TRUE;
}
