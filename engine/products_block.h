/* The attention of one decoder layer for a single new token a row, from its input to its output projection, in one call:
 * products, norms of heads or of all of them, rotary positions, the new column of the cache, attention, output.
 *
 * Numbers pass through `dtype` where a module of transformers lets them pass: before and after attention, and in the cache.
 */

struct block {
    int dtype;
    struct matrix q, k, v, out;
    struct norm q_norm, k_norm;
    long head, rotary; /* numbers of a head, and how many of them turn */
    float scale;
    const float *sinks;           /* one for each head that asks, or NULL */
    int turning, late, positions; /* who turns with whom; norms come after; the dtype of cosines and sines */
};

/* Number i of a head turns with number i + rotary / 2, or with its neighbour. Cosines and sines are one for each number,
 * or `ONCE` for the two, as many as half of the numbers. */
enum { HALVES, NEIGHBOURS, NEIGHBOURS_EACH, HALVES_ONCE };

static void normalise(const struct norm *n, int dtype, float *x, long count)
{
    const long size = dtype == FLOAT32 ? 4 : 2;
    for (float *row = x; n->weights && row < x + count; row += n->width) {
        float squares[LONGEST_VECTOR] = {0}, sum = 0;
        for (long i = 0; i < n->width; i += LONGEST_VECTOR)
            for (long lane = 0; lane < LONGEST_VECTOR && i + lane < n->width; lane++)
                squares[lane] += row[i + lane] * row[i + lane];
        for (int lane = 0; lane < LONGEST_VECTOR; lane++)
            sum += squares[lane];
        const float factor = 1 / sqrtf(sum / n->width + n->least);
        for (long i = 0; i < n->width; i++)
            row[i] *= factor * number(n->weights + i * size, dtype);
    }
}

static void turn_neighbours(const struct block *b, float *x, long heads, const float *cos, const float *sin)
{
    for (float *head = x; head < x + heads * b->head; head += b->head)
        for (long i = 0; i < b->rotary; i += 2) {
            const float one = head[i], other = head[i + 1];
            const long at = b->turning == NEIGHBOURS ? i / 2 : i;
            head[i] = one * cos[at] - other * sin[at];
            head[i + 1] = other * cos[at] + one * sin[at];
        }
}

static void turn(const struct block *b, float *x, long heads, const float *cos, const float *sin)
{
    const long half = b->rotary / 2, far = b->turning == HALVES_ONCE ? 0 : half;
    if (b->turning == NEIGHBOURS || b->turning == NEIGHBOURS_EACH) {
        turn_neighbours(b, x, heads, cos, sin);
        return;
    }
    for (float *head = x; head < x + heads * b->head; head += b->head)
        for (long i = 0; i < half; i++) {
            const float one = head[i], other = head[i + half];
            head[i] = one * cos[i] - other * sin[i];
            head[i + half] = other * cos[i + far] + one * sin[i + far];
        }
}

/* One token's queries and keys: their norms and the turns of their heads, in the block's order. */
static void arrange(const struct block *b, const struct cache *c, float *q, float *k, const float *cos, const float *sin)
{
    for (int late = 0; late < 2; late++)
        if (late == b->late) {
            normalise(&b->q_norm, b->dtype, q, b->q.rows);
            normalise(&b->k_norm, b->dtype, k, b->k.rows);
        } else {
            turn(b, q, c->heads * c->groups, cos, sin);
            turn(b, k, c->heads, cos, sin);
        }
}

/* Where the numbers of one call lie: floats of all rows, then what attention takes and gives, in the block's dtype. */
struct room {
    float *x, *q, *k, *v, *cos, *sin;
    char *asked, *found;
};

static void project(multiply_t multiply, const struct block *b, const struct room *r, long rows, float **pointers, int threads)
{
    const struct matrix *matrices[3] = {&b->q, &b->k, &b->v};
    float *results[3] = {r->q, r->k, r->v}, **inputs = pointers, **outputs = pointers + rows;
    for (long row = 0; row < rows; row++) {
        inputs[row] = r->x + row * pitch(b->q.columns);
        for (int one = 0; one < 3; one++)
            outputs[one * rows + row] = results[one] + row * matrices[one]->rows;
    }
    threads = threads_for((b->q.rows + b->k.rows + b->v.rows) * b->q.columns * (b->dtype == FLOAT32 ? 4 : 2), threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        for (int one = 0; one < 3; one++)
            multiply(matrices[one], b->dtype, (const float *const *)inputs, rows, outputs + one * rows,
                     share(matrices[one]->rows, part, parts), share(matrices[one]->rows, part + 1, parts));
    }
}

/* Queries become `asked`, keys and values the cache's last column. */
static void place(const struct block *b, const struct cache *c, const struct room *r, const char *cos, const char *sin,
                  long position_row, char *keys, char *values)
{
    const long size = b->dtype == FLOAT32 ? 4 : 2, last = c->columns - 1;
    const long turns = b->turning == HALVES_ONCE ? b->rotary / 2 : b->rotary;
    for (long row = 0; row < c->rows; row++) {
        float *q = r->q + row * b->q.rows, *k = r->k + row * b->k.rows, *v = r->v + row * b->v.rows;
        widen(cos + row * position_row, b->positions, turns, r->cos);
        widen(sin + row * position_row, b->positions, turns, r->sin);
        arrange(b, c, q, k, r->cos, r->sin);
        narrow(q, b->dtype, b->q.rows, r->asked + row * b->q.rows * size);
        for (long head = 0; head < c->heads; head++) {
            narrow(k + head * b->head, b->dtype, b->head,
                   keys + row * c->key_row + head * c->key_head + last * c->key_column);
            narrow(v + head * b->head, b->dtype, b->head,
                   values + row * c->value_row + head * c->value_head + last * c->value_column);
        }
    }
}

/* Room for one call in one piece: pointers, floats, then what has the block's dtype. */
static float **find_room(struct room *r, const struct block *b, long rows)
{
    const long floats = rows * (pitch(b->q.columns) + b->q.rows + b->k.rows + b->v.rows) + 2 * b->rotary;
    float **pointers = malloc(4 * sizeof(float *) * rows + LINE + sizeof(float) * (floats + 2 * rows * b->q.rows));
    if (!pointers)
        return NULL;
    r->x = aligned((float *)(pointers + 4 * rows));
    r->q = r->x + rows * pitch(b->q.columns);
    r->k = r->q + rows * b->q.rows;
    r->v = r->k + rows * b->k.rows;
    r->cos = r->v + rows * b->v.rows;
    r->sin = r->cos + b->rotary;
    r->asked = (char *)(r->sin + b->rotary);
    r->found = r->asked + sizeof(float) * rows * b->q.rows;
    return pointers;
}

/* 0 where there is no memory. */
static int run_block(int set, const struct block *b, struct cache *c, const char *x, const char *cos, const char *sin,
                     long position_row, char *keys, char *values, const char *mask, char *out, int threads)
{
    struct room r;
    float **pointers = find_room(&r, b, c->rows);
    float *last = pointers ? malloc((sizeof(float) * (pitch(b->out.columns) + b->out.rows) + 2 * sizeof(float *)) * c->rows + LINE) : NULL;
    int done = last != NULL;
    if (done) {
        take(set, x, b->dtype, c->rows, b->q.columns, r.x);
        project(sets[set].multiply, b, &r, c->rows, pointers, threads);
        place(b, c, &r, cos, sin, position_row, keys, values);
        done = attend_all(set, c, b->dtype, r.asked, keys, values, mask, b->scale, r.found, threads);
    }
    if (done) {
        const float **inputs = (const float **)last;
        product(set, &b->out, b->dtype, r.found, c->rows, out, (float *)(inputs + 2 * c->rows), inputs,
                (float **)(inputs + c->rows), threads);
    }
    free(last);
    free(pointers);
    return done;
}

static struct matrix projection(unsigned long long weights, unsigned long long bias, long rows, long columns)
{
    return (struct matrix){(const char *)weights, (const char *)bias, rows, columns, columns};
}

/* The fields of a block as Python keeps them. */
static int parse_block(PyObject *fields, struct block *b)
{
    unsigned long long w[4], bias[4], norms[2], sinks;
    long rows[4], hidden;
    if (!PyArg_ParseTuple(fields, "iKKlKKlKKlKKllKlfKlfllfiiiK", &b->dtype, w, bias, rows, w + 1, bias + 1, rows + 1, w + 2, bias + 2,
                          rows + 2, w + 3, bias + 3, rows + 3, &hidden, norms, &b->q_norm.width, &b->q_norm.least, norms + 1,
                          &b->k_norm.width, &b->k_norm.least, &b->head, &b->rotary, &b->scale, &b->turning, &b->late,
                          &b->positions, &sinks))
        return 0;
    b->sinks = (const float *)sinks;
    b->q = projection(w[0], bias[0], rows[0], hidden);
    b->k = projection(w[1], bias[1], rows[1], hidden);
    b->v = projection(w[2], bias[2], rows[2], hidden);
    b->out = projection(w[3], bias[3], rows[3], rows[0]);
    b->q_norm.weights = (const char *)norms[0];
    b->k_norm.weights = (const char *)norms[1];
    return 1;
}

static int parse_cache(PyObject *fields, const struct block *b, struct cache *c)
{
    if (!PyArg_ParseTuple(fields, "llllllllll", &c->rows, &c->heads, &c->columns, &c->key_row, &c->key_head, &c->key_column,
                          &c->value_row, &c->value_head, &c->value_column, &c->mask_row))
        return 0;
    c->groups = b->q.rows / b->head / c->heads;
    c->key_width = c->value_width = b->head;
    c->sinks = b->sinks;
    return 1;
}

static PyObject *py_block(PyObject *self, PyObject *args)
{
    int set, threads, had_room;
    struct block b;
    struct cache c;
    PyObject *block, *cache;
    unsigned long long x, out, cos, sin, keys, values, mask;
    long position_row;
    if (!PyArg_ParseTuple(args, "iO!KKKKlKKKiO!", &set, &PyTuple_Type, &block, &x, &out, &cos, &sin, &position_row, &keys,
                          &values, &mask, &threads, &PyTuple_Type, &cache) || !check_set(set) || !parse_block(block, &b) ||
        !parse_cache(cache, &b, &c))
        return NULL;
    Py_BEGIN_ALLOW_THREADS
    had_room = run_block(set, &b, &c, (const char *)x, (const char *)cos, (const char *)sin, position_row, (char *)keys,
                         (char *)values, (const char *)mask, (char *)out, threads);
    Py_END_ALLOW_THREADS
    if (!had_room)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}
