/* Attention of one new token a row over the cache, which is read once for all heads that share it. Included by products.c.
 */
static long look(const char *mask, long columns, long *seen)
{
    long count = 0;
    for (long column = 0; column < columns; column++)
        if (!mask || mask[column])
            seen[count++] = column;
    return count;
}

/* One unit: the query heads of a row that share a head of the cache. `room` is one thread's. */
static void attend_unit(int set, const struct cache *c, int dtype, long unit, const long *columns, long count,
                        const char *q, const char *keys, const char *values, float scale, char *out, char *room)
{
    const long size = dtype == FLOAT32 ? 4 : 2, row = unit / c->heads, head = unit % c->heads;
    const long first = (row * c->heads + head) * c->groups;
    const float **inputs = (const float **)room;
    float **outputs = (float **)(inputs + c->groups);
    float *wide = (float *)(outputs + c->groups), *found = wide + c->groups * c->key_width;
    float *scores = found + c->groups * c->value_width;
    const char *asked = q + first * c->key_width * size;
    const int as_it_is = dtype == FLOAT32 || sets[set].pairs;
    if (!as_it_is)
        widen(asked, dtype, c->groups * c->key_width, wide);
    for (long one = 0; one < c->groups; one++) {
        inputs[one] = as_it_is ? (const float *)(asked + one * c->key_width * size) : wide + one * c->key_width;
        outputs[one] = found + one * c->value_width;
    }
    const struct seen seen = {keys + row * c->key_row + head * c->key_head, values + row * c->value_row + head * c->value_head,
                              columns, count, scale, c->sinks ? c->sinks + head * c->groups : NULL};
    sets[set].attend(c, &seen, dtype, inputs, scores, outputs);
    narrow(found, dtype, c->groups * c->value_width, out + first * c->value_width * size);
}

/* All rows and heads; which columns a row sees is looked up once for all of its heads. 0 where there is no memory. */
static int attend_all(int set, struct cache *c, int dtype, const char *q, const char *keys, const char *values,
                      const char *mask, float scale, char *out, int threads)
{
    c->room = (c->columns + LONGEST_VECTOR - 1) / LONGEST_VECTOR * LONGEST_VECTOR;
    const long units = c->rows * c->heads, size = dtype == FLOAT32 ? 4 : 2, lists = mask && c->mask_row ? c->rows : 1;
    const long needed = 16 * c->groups + 4 * (c->groups * (c->key_width + c->value_width) + MOST_BLOCK * c->room);
    const long piece = (needed + LINE - 1) / LINE * LINE;
    threads = threads_for(units * c->columns * (c->key_width + c->value_width) * size, threads);
    char *room = malloc(piece * threads + sizeof(long) * lists * (1 + c->columns));
    if (!room)
        return 0;
    long *counts = (long *)(room + piece * threads), *columns = counts + lists;
    for (long list = 0; list < lists; list++)
        counts[list] = look(mask ? mask + list * c->mask_row : NULL, c->columns, columns + list * c->columns);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        for (long unit = share(units, part, parts); unit < share(units, part + 1, parts); unit++) {
            const long list = lists == 1 ? 0 : unit / c->heads;
            attend_unit(set, c, dtype, unit, columns + list * c->columns, counts[list], q, keys, values, scale, out,
                        room + part * piece);
        }
    }
    free(room);
    return 1;
}

/* q [rows, heads * groups, key width], the cache, mask [rows, columns] of bytes or none -> out [rows, heads * groups,
 * value width]. */
static PyObject *py_attend(PyObject *self, PyObject *args)
{
    int set, dtype, threads;
    float scale;
    unsigned long long q, keys, values, mask, out, sinks;
    struct cache c;
    if (!PyArg_ParseTuple(args, "iiKKKKKKfi(lllllllllllll)", &set, &dtype, &q, &keys, &values, &mask, &sinks, &out, &scale, &threads,
                          &c.rows, &c.heads, &c.groups, &c.columns, &c.key_width, &c.value_width, &c.key_row, &c.key_head,
                          &c.key_column, &c.value_row, &c.value_head, &c.value_column, &c.mask_row) || !check_set(set))
        return NULL;
    int had_room;
    c.sinks = (const float *)sinks;
    Py_BEGIN_ALLOW_THREADS
    had_room = attend_all(set, &c, dtype, (const char *)q, (const char *)keys, (const char *)values,
                          (const char *)mask, scale, (char *)out, threads);
    Py_END_ALLOW_THREADS
    if (!had_room)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}
