/* An MoE layer's experts for many tokens, over the bank's slots. Each expert's tokens go through in pieces of as many as
 * the vectors hold; threads take the next piece as they come, since pieces share nothing.
 */

struct piece {
    const char *slot;
    const long *pairs; /* the choices, token x top_k + place, that it computes */
    long count, in_all; /* choices: its own, and those of its expert */
};

/* Sorts the choices by slot into `pairs` and cuts them; negative slots are nobody's. `ends` [bank's slots + 1] is 0. */
static long cut(const int64_t *slots, long choices, long bank_slots, long rows, const char *bank, long slot_bytes,
                long *ends, long *pairs, struct piece *pieces)
{
    long found = 0;
    for (long pair = 0; pair < choices; pair++)
        if (slots[pair] >= 0)
            ends[slots[pair] + 1]++;
    for (long slot = 0; slot < bank_slots; slot++)
        ends[slot + 1] += ends[slot];
    for (long pair = 0; pair < choices; pair++)
        if (slots[pair] >= 0)
            pairs[ends[slots[pair]]++] = pair;
    for (long slot = 0, at = 0; slot < bank_slots; slot++)
        for (const long in_all = ends[slot] - at; at < ends[slot]; at += pieces[found++].count) {
            const long left = ends[slot] - at;
            pieces[found] = (struct piece){bank + slot * slot_bytes, pairs + at, left < rows ? left : rows, in_all};
        }
    return found;
}

/* How one call's experts are computed: in pieces of at most `rows`, by `few` where no more than `at_most` tokens go to one. */
struct ways {
    long rows, at_most;
    expert_t many, few;
};

/* Bfloat16 by the processor's own instruction for it: dot products where an expert gets few tokens or its widths are odd,
 * else rows across the lanes. Then pieces are smaller than they may be where there are too few of them for all threads. */
static struct ways ways_of(int set, const struct layout *l, const int64_t *slots, long choices, int threads)
{
    struct ways ways = {sets[set].rows, 0, sets[set].expert, sets[set].expert};
#if SETS == 4
    if (sets[set].pairs && l->dtype == BFLOAT16) {
        long live = 0;
        for (long pair = 0; pair < choices; pair++)
            live += slots[pair] >= 0;
        const long share = (live / threads + PAIR_LANES - 1) / PAIR_LANES * PAIR_LANES, most = PAIR_LANES * PAIR_VECTORS;
        const int odd = l->hidden % 2 || l->inner % 2, small = l->hidden * l->inner * (2 + l->gated) <= SMALL;
        ways.rows = share < PAIR_LANES ? PAIR_LANES : share < most ? share : most;
        ways.few = expert_pairs;
        ways.at_most = odd ? choices : small ? FEW_OF_SMALL : FEW_OF_LARGE;
    }
#endif
    return ways;
}

static long floats_for_expert(const struct layout *l, long rows)
{
    const long wider = l->hidden > l->inner ? l->hidden : l->inner;
    return pitch((2 * pitch(wider) + pitch(l->inner * (1 + l->gated))) * rows + 8 * wider);
}

/* What one call needs, a piece after the other; without `base` they are only counted. */
struct arena {
    char *base;
    long used;
};

static void *carve(struct arena *a, long bytes)
{
    char *here = a->base + a->used;
    a->used += (bytes + LINE - 1) / LINE * LINE;
    return here;
}

struct many {
    struct ways ways;
    const int64_t *slots;
    long choices, bank_slots, floats; /* `floats` of room for each thread */
    float *room;
    struct piece *pieces;
    long *ends;
};

static void carve_many(int set, const struct layout *l, const int64_t *slots, long choices, long bank_slots, int threads,
                       struct arena *a, struct many *m)
{
    *m = (struct many){ways_of(set, l, slots, choices, threads), slots, choices, bank_slots};
    m->floats = floats_for_expert(l, m->ways.rows);
    const long most = choices / m->ways.rows + (choices < bank_slots ? choices : bank_slots); /* full pieces and last ones */
    m->room = carve(a, sizeof(float) * m->floats * threads);
    m->pieces = carve(a, sizeof *m->pieces * (most + 1));
    m->ends = carve(a, sizeof *m->ends * (bank_slots + 1 + choices));
}

static void run_many(const struct layout *l, const struct many *m, const char *bank, const char *x, long top_k, float *y,
                     int threads)
{
    memset(m->ends, 0, sizeof *m->ends * (m->bank_slots + 1));
    const long found = cut(m->slots, m->choices, m->bank_slots, m->ways.rows, bank, l->slot_bytes, m->ends,
                           m->ends + m->bank_slots + 1, m->pieces);
    threads = found < threads ? (int)found : threads;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (const struct piece *p = m->pieces; p < m->pieces + found; p++)
        (p->in_all <= m->ways.at_most ? m->ways.few : m->ways.many)(l, p->slot, x, top_k, p->pairs, p->count, y,
                                                                    m->room + m->floats * omp_get_thread_num());
}

static PyObject *py_many(PyObject *self, PyObject *args)
{
    int set, threads;
    unsigned long long bank, x, slots, y, room;
    long bank_slots, tokens, top_k, size;
    struct layout l;
    if (!PyArg_ParseTuple(args, "i" LAYOUT "KlKllKKKli", &set, FIELDS(l), &bank, &bank_slots, &x, &tokens, &top_k, &slots, &y,
                          &room, &size, &threads) || !check_set(set))
        return NULL;
    struct arena a = {(char *)room, 0};
    struct many m;
    carve_many(set, &l, (const int64_t *)slots, tokens * top_k, bank_slots, threads, &a, &m);
    if (a.used > size)
        return PyLong_FromLong(a.used);
    Py_BEGIN_ALLOW_THREADS
    run_many(&l, &m, (const char *)bank, (const char *)x, top_k, (float *)y, threads);
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(0);
}

/* Floats that `multiply_many` needs beside a matrix of so many columns: x across the lanes, a panel of products, weights. */
static long floats_for_rows(int set, long columns)
{
    return pitch(sets[set].rows * (columns + PANEL_ROWS) + 4 * columns);
}

/* x [rows, columns] times the matrix, rows of both in one piece: each thread takes pieces of x, and of wide matrices parts. */
static PyObject *py_product_many(PyObject *self, PyObject *args)
{
    int set, dtype, threads;
    unsigned long long x, weights, bias, y, room;
    long rows, size;
    struct matrix m = {0};
    if (!PyArg_ParseTuple(args, "iiKKKKlllKli", &set, &dtype, &x, &weights, &bias, &y, &rows, &m.rows, &m.columns, &room, &size,
                          &threads) || !check_set(set))
        return NULL;
    m.weights = (const char *)weights, m.bias = (const char *)bias, m.stride = m.columns;
    const long floats = floats_for_rows(set, m.columns), needed = sizeof(float) * floats * threads;
    if (needed > size)
        return PyLong_FromLong(needed);
    const long bytes = dtype == FLOAT32 ? 4 : 2, together = sets[set].rows, pieces = (rows + together - 1) / together;
    const long parts = pieces < threads && m.rows >= threads * PANEL_ROWS ? threads : 1;
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (long unit = 0; unit < pieces * parts; unit++) {
        const long first = unit / parts * together, count = rows - first < together ? rows - first : together;
        const int part = (int)(unit % parts);
        sets[set].multiply_many(&m, dtype, (const char *)x + first * m.columns * bytes, count,
                                whole_vectors(share(m.rows, part, (int)parts), m.rows),
                                whole_vectors(share(m.rows, part + 1, (int)parts), m.rows),
                                (char *)y + first * m.rows * bytes, (float *)room + floats * omp_get_thread_num());
    }
    Py_END_ALLOW_THREADS
    return PyLong_FromLong(0);
}
