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

static PyObject *py_many(PyObject *self, PyObject *args)
{
    int set, threads;
    unsigned long long bank, x, slots, y;
    long bank_slots, tokens, top_k;
    struct layout l;
    if (!PyArg_ParseTuple(args, "i" LAYOUT "KlKllKKi", &set, FIELDS(l), &bank, &bank_slots, &x, &tokens, &top_k,
                          &slots, &y, &threads) || !check_set(set))
        return NULL;
    const long choices = tokens * top_k;
    const struct ways ways = ways_of(set, &l, (const int64_t *)slots, choices, threads);
    const long floats = floats_for_expert(&l, ways.rows);
    const long most = choices / ways.rows + (choices < bank_slots ? choices : bank_slots); /* pieces: full ones and last ones */
    float *room = malloc(LINE + sizeof(float) * floats * threads);
    struct piece *pieces = malloc(sizeof *pieces * (most + 1));
    long *ends = calloc(bank_slots + 1 + choices, sizeof *ends);
    if (room && pieces && ends) {
        Py_BEGIN_ALLOW_THREADS
        const long found = cut((const int64_t *)slots, choices, bank_slots, ways.rows, (const char *)bank, l.slot_bytes, ends,
                               ends + bank_slots + 1, pieces);
        threads = found < threads ? (int)found : threads;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
        for (const struct piece *p = pieces; p < pieces + found; p++)
            (p->in_all <= ways.at_most ? ways.few : ways.many)(&l, p->slot, (const char *)x, top_k, p->pairs, p->count, (float *)y,
                                                             aligned(room) + floats * omp_get_thread_num());
        Py_END_ALLOW_THREADS
    }
    const int had_room = room && pieces && ends;
    free(room);
    free(pieces);
    free(ends);
    if (!had_room)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}
