/* Products of few rows with row-major weights, which are read once, as fast as memory gives them; an MoE layer's experts
 * for few tokens, over the bank's slots; and attention of one new token a row over the cache, which is read once, too. Python holds every buffer and passes addresses; nothing is kept here.
 *
 * Sums are 32-bit floats. Loops are compiled for several instruction sets and chosen by what the processor has. Threads
 * are OpenMP's, the same runtime that torch brings. docs/performance.md says what each choice gains.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE inline __attribute__((always_inline))

enum { FLOAT32, BFLOAT16, FLOAT16, FLOAT8 }; /* the last two are only read: products_convert.h */
enum { SILU, GELU, GELU_TANH, RELU };

#define LINE 64                 /* bytes of a cache line */
#define AHEAD 8192              /* bytes: weights are on their way into the second cache this far before their use */
#define WORTH_A_THREAD (1 << 18) /* bytes of weights; waking a thread for fewer takes longer than reading them */

typedef float four __attribute__((vector_size(16)));

struct matrix {
    const char *weights; /* [rows, columns], rows `stride` entries apart */
    const char *bias;    /* [rows] or NULL */
    long rows, columns, stride;
};

/* Keys and values of one attention layer. `room` is `columns` up to a whole vector. */
struct cache {
    long rows, heads, groups, columns, room, key_width, value_width;
    long key_row, key_head, key_column, value_row, value_head, value_column, mask_row; /* strides, in bytes */
};

/* What one row and head of it sees: only these columns count, so those that are masked change not even the order of sums. */
struct seen {
    const char *keys, *values;
    const long *columns;
    long count;
};

#define LONGEST_VECTOR 16 /* floats */
#define MOST_BLOCK 4      /* of the variants */

static INLINE float number(const char *from, const int dtype)
{
    float value;
    if (dtype == FLOAT32) {
        memcpy(&value, from, 4);
    } else {
        uint16_t half;
        memcpy(&half, from, 2);
        uint32_t word = (uint32_t)half << 16;
        memcpy(&value, &word, 4);
    }
    return value;
}

/* Rounds to the nearest, ties to even, as torch does. */
static INLINE void put(char *to, float value, const int dtype)
{
    if (dtype == FLOAT32) {
        memcpy(to, &value, 4);
        return;
    }
    uint32_t word;
    memcpy(&word, &value, 4);
    uint16_t half = isnan(value) ? 0x7fc0 : (uint16_t)((word + 0x7fff + ((word >> 16) & 1)) >> 16);
    memcpy(to, &half, 2);
}

static INLINE float activated(float x, const int activation)
{
    switch (activation) {
    case SILU: return x / (1 + expf(-x));
    case GELU: return 0.5f * x * (1 + erff(x * 0.70710678f));
    case GELU_TANH: return 0.5f * x * (1 + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    default: return x > 0 ? x : 0;
    }
}

/* How an expert lies in a slot: offsets in bytes, -1 where there is no bias. */
struct layout {
    int dtype, activation, gated;
    long hidden, inner, slot_bytes, up, up_bias, down, down_bias;
};

static struct matrix up_of(const struct layout *l, const char *slot)
{
    return (struct matrix){slot + l->up, l->up_bias < 0 ? NULL : slot + l->up_bias, l->inner * (1 + l->gated), l->hidden,
                           l->hidden};
}

static struct matrix down_of(const struct layout *l, const char *slot)
{
    return (struct matrix){slot + l->down, l->down_bias < 0 ? NULL : slot + l->down_bias, l->hidden, l->inner, l->inner};
}

static INLINE long size_of(const int dtype)
{
    return dtype == FLOAT8 ? 1 : dtype == FLOAT32 ? 4 : 2;
}

/* A matrix [rows, columns], stored in one piece, and where it goes: `to_row` and `to_column` are strides there, in entries.
 * Scales [rows / block_rows, columns / block_columns], both rounded up; NULL for none. */
struct conversion {
    int kind, dtype, scales_dtype;
    const char *from, *scales;
    char *to;
    long rows, columns, to_row, to_column, block_rows, block_columns;
};

static INLINE const char *scales_of(const struct conversion *c, long row)
{
    const long blocks = (c->columns + c->block_columns - 1) / c->block_columns;
    return c->scales ? c->scales + row / c->block_rows * blocks * size_of(c->scales_dtype) : NULL;
}

/* Floats from one row of inputs to the next: whole lines of the cache, and not a power of two of them, or else many rows
 * would share few places of the first cache. */
static INLINE long pitch(long columns)
{
    return (columns + LINE / 4 - 1) / (LINE / 4) * (LINE / 4) + LINE / 4;
}

/* The next whole line of the cache: a vector that lies in two takes two readings. */
static INLINE float *aligned(float *room)
{
    return (float *)(((uintptr_t)room + LINE - 1) / LINE * LINE);
}

#define PASTE(a, b) a##_##b
#define EXPAND(a, b) PASTE(a, b)

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SETS 4
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")
#define NAME(x) EXPAND(x, v4)
#define LANES 16
#define BLOCK 4
#define VECTORS 2
#include "products_variant.h"
#include "products_many_variant.h"
#include "products_convert_variant.h"
#undef NAME
#undef LANES
#undef BLOCK
#undef VECTORS
#pragma GCC target("avx512bf16")
#include "products_pairs.h"
#include "products_pairs_many.h"
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define NAME(x) EXPAND(x, v3)
#define LANES 8
#define BLOCK 2
#define VECTORS 2
#include "products_variant.h"
#include "products_many_variant.h"
#include "products_convert_variant.h"
#undef NAME
#undef LANES
#undef BLOCK
#undef VECTORS
#pragma GCC pop_options
#else
#define SETS 1
#endif

#define NAME(x) EXPAND(x, base)
#define LANES 4
#ifdef __aarch64__
#define BLOCK 4
#define VECTORS 2
#else
#define BLOCK 2
#define VECTORS 2
#endif
#include "products_variant.h"
#include "products_many_variant.h"
#include "products_convert_variant.h"

typedef void (*multiply_t)(const struct matrix *, int, const float *const *, long, float *const *, long, long);
typedef void (*attend_t)(const struct cache *, const struct seen *, int, const float *const *, float *, float *const *);
typedef void (*activate_t)(const struct layout *, float *);
typedef void (*expert_t)(const struct layout *, const char *, const char *, long, const long *, long, float *, float *);
typedef void (*convert_t)(const struct conversion *, long, long);

static const struct {
    const char *name;
    multiply_t multiply;
    attend_t attend;
    activate_t activate;
    expert_t expert;
    convert_t convert;
    long rows; /* that `expert` takes at a time */
    int pairs; /* 1: inputs for bfloat16 weights are bfloat16, too; 0: they are floats */
} sets[SETS] = {
#if SETS == 4
    {"AVX-512 BF16", multiply_pairs, attend_v4, activate_pairs, expert_spread, convert_v4, 32, 1},
    {"AVX-512", multiply_v4, attend_v4, activate_v4, expert_v4, convert_v4, 32, 0},
    {"AVX2", multiply_v3, attend_v3, activate_v3, expert_v3, convert_v3, 16, 0},
    {"SSE2", multiply_base, attend_base, activate_base, expert_base, convert_base, 8, 0},
#elif defined(__aarch64__)
    {"NEON", multiply_base, attend_base, activate_base, expert_base, convert_base, 16, 0},
#else
    {"portable", multiply_base, attend_base, activate_base, expert_base, convert_base, 8, 0},
#endif
};

static int runs_here(int set)
{
#if SETS == 4
    __builtin_cpu_init();
    if (set <= 1)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               (set == 1 || __builtin_cpu_supports("avx512bf16"));
    if (set == 2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
    return set < SETS;
}

static INLINE long share(long total, int part, int parts)
{
    return total * part / parts;
}

static int threads_for(long bytes, int threads)
{
    long worth = bytes / WORTH_A_THREAD;
    return worth < 1 ? 1 : worth < threads ? (int)worth : threads;
}

static void widen(const char *from, int dtype, long count, float *to)
{
    const long size = dtype == FLOAT32 ? 4 : 2;
    for (long i = 0; i < count; i++)
        to[i] = number(from + i * size, dtype);
}

static void narrow(const float *from, int dtype, long count, char *to)
{
    const long size = dtype == FLOAT32 ? 4 : 2;
    for (long i = 0; i < count; i++)
        put(to + i * size, from[i], dtype);
}

/* x [rows, columns] as `multiply` of the set takes it, rows a pitch apart. */
static void take(int set, const char *x, int dtype, long rows, long columns, float *to)
{
    const long size = dtype == FLOAT32 ? 4 : 2;
    for (long row = 0; row < rows; row++)
        if (dtype == FLOAT32 || sets[set].pairs)
            memcpy(to + row * pitch(columns), x + row * columns * size, columns * size);
        else
            widen(x + row * columns * size, dtype, columns, to + row * pitch(columns));
}

/* x [rows, columns] times the matrix -> y [rows, m->rows] in `dtype`; `room` holds both as floats, x a pitch apart. */
static void product(int set, const struct matrix *m, int dtype, const char *x, long rows, char *y, float *room,
                    const float **inputs, float **outputs, int threads)
{
    const long size = dtype == FLOAT32 ? 4 : 2;
    room = aligned(room);
    float *found = room + rows * pitch(m->columns);
    take(set, x, dtype, rows, m->columns, room);
    for (long row = 0; row < rows; row++) {
        inputs[row] = room + row * pitch(m->columns);
        outputs[row] = dtype == FLOAT32 ? (float *)y + row * m->rows : found + row * m->rows;
    }
    threads = threads_for(m->rows * m->columns * size, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int part = omp_get_thread_num(), parts = omp_get_num_threads();
        sets[set].multiply(m, dtype, inputs, rows, outputs, share(m->rows, part, parts), share(m->rows, part + 1, parts));
    }
    if (dtype != FLOAT32)
        narrow(found, dtype, rows * m->rows, y);
}

#include "products_shared.h"

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

static long look(const char *mask, long columns, long *seen)
{
    long count = 0;
    for (long column = 0; column < columns; column++)
        if (!mask || mask[column])
            seen[count++] = column;
    return count;
}

/* One unit: the query heads of a row that share a head of the cache. `room` is one thread's. */
static void attend_unit(attend_t attend, const struct cache *c, int dtype, long unit, const long *columns, long count,
                        const char *q, const char *keys, const char *values, float scale, char *out, char *room)
{
    const long size = dtype == FLOAT32 ? 4 : 2, row = unit / c->heads, head = unit % c->heads;
    const long first = (row * c->heads + head) * c->groups;
    const float **inputs = (const float **)room;
    float **outputs = (float **)(inputs + c->groups);
    float *wide = (float *)(outputs + c->groups), *found = wide + c->groups * c->key_width;
    float *scores = found + c->groups * c->value_width;
    widen(q + first * c->key_width * size, dtype, c->groups * c->key_width, wide);
    for (long i = 0; i < c->groups * c->key_width; i++)
        wide[i] *= scale;
    for (long one = 0; one < c->groups; one++) {
        inputs[one] = wide + one * c->key_width;
        outputs[one] = found + one * c->value_width;
    }
    const struct seen seen = {keys + row * c->key_row + head * c->key_head, values + row * c->value_row + head * c->value_head,
                              columns, count};
    attend(c, &seen, dtype, inputs, scores, outputs);
    narrow(found, dtype, c->groups * c->value_width, out + first * c->value_width * size);
}

/* All rows and heads; which columns a row sees is looked up once for all of its heads. 0 where there is no memory. */
static int attend_all(attend_t attend, struct cache *c, int dtype, const char *q, const char *keys, const char *values,
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
            attend_unit(attend, c, dtype, unit, columns + list * c->columns, counts[list], q, keys, values, scale, out,
                        room + part * piece);
        }
    }
    free(room);
    return 1;
}

struct norm {
    const char *weights; /* [width], NULL for none */
    long width;
    float least;
};

/* to [rows, width] = weights x (each row by its root mean square), rounded before and after the weights as a module of
 * transformers does. */
static void norm_rows(const struct norm *n, int dtype, const char *x, long rows, char *to)
{
    const long size = dtype == FLOAT32 ? 4 : 2;
    for (const char *end = x + rows * n->width * size; x < end; x += n->width * size, to += n->width * size) {
        float squares[LONGEST_VECTOR] = {0}, sum = 0;
        for (long i = 0; i < n->width; i += LONGEST_VECTOR)
            for (long lane = 0; lane < LONGEST_VECTOR && i + lane < n->width; lane++) {
                const float value = number(x + (i + lane) * size, dtype);
                squares[lane] += value * value;
            }
        for (int lane = 0; lane < LONGEST_VECTOR; lane++)
            sum += squares[lane];
        const float scale = 1 / sqrtf(sum / n->width + n->least);
        for (long i = 0; i < n->width; i++) {
            put(to + i * size, number(x + i * size, dtype) * scale, dtype);
            put(to + i * size, number(n->weights + i * size, dtype) * number(to + i * size, dtype), dtype);
        }
    }
}

/* ---- what Python calls ------------------------------------------------------------------------------------------ */

static int check_set(int set)
{
    if (set >= 0 && set < SETS && runs_here(set))
        return 1;
    PyErr_Format(PyExc_ValueError, "no instruction set %d on this processor", set);
    return 0;
}

static PyObject *py_sets(PyObject *self, PyObject *ignored)
{
    PyObject *names = PyDict_New();
    for (int set = 0; names && set < SETS; set++) {
        PyObject *number = runs_here(set) ? PyLong_FromLong(set) : NULL;
        if (number && PyDict_SetItemString(names, sets[set].name, number) < 0)
            Py_CLEAR(names);
        Py_XDECREF(number);
    }
    return names;
}

static PyObject *py_tiles(PyObject *self, PyObject *ignored)
{
#if SETS == 4
    __builtin_cpu_init();
    return PyBool_FromLong(__builtin_cpu_supports("amx-bf16") != 0);
#else
    Py_RETURN_FALSE;
#endif
}

static PyObject *py_product(PyObject *self, PyObject *args)
{
    int set, dtype, threads;
    unsigned long long x, weights, bias, y;
    long rows;
    struct matrix m;
    if (!PyArg_ParseTuple(args, "iiKKKKlllli", &set, &dtype, &x, &weights, &bias, &y, &rows, &m.rows, &m.columns, &m.stride,
                          &threads) || !check_set(set))
        return NULL;
    m.weights = (const char *)weights;
    m.bias = (const char *)bias;
    const float **inputs = malloc(2 * sizeof(void *) * rows + LINE + sizeof(float) * rows * (pitch(m.columns) + m.rows));
    if (!inputs)
        return PyErr_NoMemory();
    float **outputs = (float **)(inputs + rows);
    Py_BEGIN_ALLOW_THREADS
    product(set, &m, dtype, (const char *)x, rows, (char *)y, (float *)(outputs + rows), inputs, outputs,
            threads);
    Py_END_ALLOW_THREADS
    free(inputs);
    Py_RETURN_NONE;
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
    if (!PyArg_ParseTuple(args, "i(iiilllllll)KKllO!Ki", &set, &l.dtype, &l.activation, &l.gated, &l.hidden, &l.inner,
                          &l.slot_bytes, &l.up, &l.up_bias, &l.down, &l.down_bias, &bank, &x, &tokens, &top_k,
                          &PyList_Type, &slots, &y, &threads) || !check_set(set) || !check_slots(slots, tokens, top_k))
        return NULL;
    if (!run_experts(set, &l, (const char *)bank, (const char *)x, tokens, slots, &none, (float *)y, threads))
        return NULL;
    Py_RETURN_NONE;
}

#include "products_many.h"

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

static PyObject *py_norm(PyObject *self, PyObject *args)
{
    int dtype;
    unsigned long long x, weights, out;
    long rows, columns;
    float least;
    if (!PyArg_ParseTuple(args, "iKKKllf", &dtype, &x, &weights, &out, &rows, &columns, &least))
        return NULL;
    const struct norm n = {(const char *)weights, columns, least};
    norm_rows(&n, dtype, (const char *)x, rows, (char *)out);
    Py_RETURN_NONE;
}

/* q [rows, heads * groups, key width], the cache, mask [rows, columns] of bytes or none -> out [rows, heads * groups,
 * value width]. */
static PyObject *py_attend(PyObject *self, PyObject *args)
{
    int set, dtype, threads;
    float scale;
    unsigned long long q, keys, values, mask, out;
    struct cache c;
    if (!PyArg_ParseTuple(args, "iiKKKKKfi(lllllllllllll)", &set, &dtype, &q, &keys, &values, &mask, &out, &scale, &threads,
                          &c.rows, &c.heads, &c.groups, &c.columns, &c.key_width, &c.value_width, &c.key_row, &c.key_head,
                          &c.key_column, &c.value_row, &c.value_head, &c.value_column, &c.mask_row) || !check_set(set))
        return NULL;
    int had_room;
    Py_BEGIN_ALLOW_THREADS
    had_room = attend_all(sets[set].attend, &c, dtype, (const char *)q, (const char *)keys, (const char *)values,
                          (const char *)mask, scale, (char *)out, threads);
    Py_END_ALLOW_THREADS
    if (!had_room)
        return PyErr_NoMemory();
    Py_RETURN_NONE;
}

#include "products_block.h"
#include "products_layer.h"
#include "products_convert.h"

static PyMethodDef methods[] = {
    {"sets", py_sets, METH_NOARGS, "Instruction sets of this processor that the loops are compiled for, the best first."},
    {"tiles", py_tiles, METH_NOARGS, "Whether the processor multiplies tiles of bfloat16, which torch uses and we do not."},
    {"product", py_product, METH_VARARGS, "(set, dtype, x, weights, bias, y, rows, outputs, columns, stride, threads)"},
    {"experts", py_experts, METH_VARARGS, "(set, layout, bank, x, tokens, top_k, slots, y, threads)"},
    {"many", py_many, METH_VARARGS, "(set, layout, bank, slots of the bank, x, tokens, top_k, slots, y, threads)"},
    {"combine", py_combine, METH_VARARGS, "(y, slots, weights, weights dtype, out, dtype, tokens, hidden)"},
    {"attend", py_attend, METH_VARARGS,
     "(set, dtype, q, keys, values, mask, out, scale, threads, (rows, heads, groups, columns, key width, value width, and in "
     "bytes the strides of rows, heads and columns of keys, the same of values, and of the mask's rows))"},
    {"block", py_block, METH_VARARGS,
     "(set, (dtype, weights, bias and rows of q, k, v and the output, hidden, weights, width and eps of two norms, width of a "
     "head, rotary numbers, scale), x, out, cos, sin, stride of a row's positions, keys, values, mask, threads, (rows, heads, "
     "columns, and strides as `attend` has them))"},
    {"layer", py_layer, METH_VARARGS,
     "(set, block as `block` has it, (weights and eps of the norms before attention and after it, router's weights, experts, "
     "top_k, renormalised, dtype of weights, scale), (x, after attention, the same normed, cos, sin, stride of a row's "
     "positions, keys, values, mask, threads), cache as `block` has it, (forbidden, stride of its rows, free weights, free "
     "index, weights)) -> what was chosen, or None"},
    {"onto", py_onto, METH_VARARGS,
     "(set, layout, bank, x, tokens, top_k, slots, weights, weights dtype, shared as `shared` has it or None, what they are added "
     "to, out, threads)"},
    {"shared", py_shared, METH_VARARGS,
     "(set, (dtype, activation, weights and bias of gate, up, down and share, hidden, inner), x, tokens, out, threads)"},
    {"convert", py_convert, METH_VARARGS,
     "(set, kind, stored, dtype of scales, scales, dtype, to, rows, columns, strides of rows and columns there, rows and columns "
     "of a block, threads)"},
    {"norm", py_norm, METH_VARARGS, "(dtype, x, weights, out, rows, columns, eps)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_products", "Matrix products and attention of few rows.", -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__products(void)
{
    return PyModule_Create(&module);
}
