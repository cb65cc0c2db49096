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

enum { FLOAT32, BFLOAT16, FLOAT16, FLOAT8, EXPONENTS }; /* the last three are only read: products_convert.h, products_coded.h */
enum { SILU, GELU, GELU_TANH, RELU, CLAMPED };

#define LINE 64                 /* bytes of a cache line */
#define AHEAD 8192              /* bytes: weights are on their way into the second cache this far before their use */
#define WORTH_A_THREAD (1 << 18) /* bytes of weights; waking a thread for fewer takes longer than reading them */

typedef float four __attribute__((vector_size(16)));

enum { AS_SERVED, MXFP4, INT4, FP8 };

/* How the numbers of a quantised matrix are stored, and what their scales are: one for each block of `rows` x `columns`, 0
 * columns being a whole row. */
struct coding {
    int way, dtype;
    long rows, columns;
};

struct matrix {
    const char *weights; /* [rows, columns], rows `stride` entries apart; across: [columns, rows], columns that far apart */
    const char *bias;    /* [rows] or NULL */
    long rows, columns, stride;
    int across;
    const char *scales; /* of quantised weights (products_coded.h); NULL for all others */
    struct coding coding;
    long part; /* rows of each matrix that was quantised by itself: this one is several of them, one below the other */
};

/* Keys and values of one attention layer. `room` is `columns` up to a whole vector. */
struct cache {
    long rows, heads, groups, columns, room, key_width, value_width;
    long key_row, key_head, key_column, value_row, value_head, value_column, mask_row; /* strides, in bytes */
    const float *sinks; /* [heads * groups] or NULL: for each head that asks, a score of which nothing comes */
};

/* What one row and head of it sees: only these columns count, so those that are masked change not even the order of sums. */
struct seen {
    const char *keys, *values;
    const long *columns;
    long count;
    float scale;        /* of the products of queries and keys */
    const float *sinks; /* of the heads that ask, or NULL */
};

/* Of linear attention: what tokens tell one head's state, [tokens, keys] each; `faded` is decay x key. Of state spaces `decay`
 * is [tokens]. */
struct told {
    long keys, tokens;
    float *q, *k, *faded, *decay, *beta; /* beta [tokens] */
};

/* Of each channel by itself, over `width` tokens. */
struct convolution {
    int dtype, silu;
    long channels, width, x_token; /* from one token's numbers to the next one's */
};

#define TOLD 32           /* tokens whose keys stay in the second cache */
#define LONGEST_VECTOR 16 /* floats */
#define TALL 8            /* columns of weights that lie across, read beside each other */
#define MOST_BLOCK 4      /* of the variants */
#define PANEL_ROWS 64     /* rows of weights whose products with many rows of x stay in the first caches */

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

/* The end of a part of `rows` numbers, moved to the end of a vector. */
static INLINE long whole_vectors(long end, long rows)
{
    const long whole = (end + LONGEST_VECTOR - 1) / LONGEST_VECTOR * LONGEST_VECTOR;
    return whole < rows ? whole : rows;
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

/* How an expert lies in a slot: offsets in bytes, -1 where there is no bias; `across`: both matrices are transposed. Its
 * gate: in halves [gate, up], or `interleaved` one by one. CLAMPED is gate x sigmoid(alpha x gate) x (up + 1), gate at most
 * and up within `limit`. Scales are those of quantised weights, at -1 where these are of the dtype; `part` is the first
 * matrix's.
 */
struct layout {
    int dtype, activation, gated;
    long hidden, inner, slot_bytes, up, up_bias, down, down_bias;
    int across, interleaved;
    float alpha, limit;
    long up_scales, down_scales;
    struct coding coding;
    long part;
};

/* As Python keeps it. */
#define LAYOUT "(iiillllllliifflliilll)"
#define FIELDS(l)                                                                                                      \
    &(l).dtype, &(l).activation, &(l).gated, &(l).hidden, &(l).inner, &(l).slot_bytes, &(l).up, &(l).up_bias, &(l).down, \
        &(l).down_bias, &(l).across, &(l).interleaved, &(l).alpha, &(l).limit, &(l).up_scales, &(l).down_scales, \
        &(l).coding.way, &(l).coding.dtype, &(l).coding.rows, &(l).coding.columns, &(l).part

/* Where channel i of [gate, up] has its two numbers. */
static INLINE long gate_row(const struct layout *l, long i)
{
    return l->interleaved ? 2 * i : i;
}

static INLINE long up_row(const struct layout *l, long i)
{
    return l->interleaved ? 2 * i + 1 : l->inner + i;
}

static struct matrix up_of(const struct layout *l, const char *slot)
{
    const long rows = l->inner * (1 + l->gated);
    return (struct matrix){slot + l->up, l->up_bias < 0 ? NULL : slot + l->up_bias, rows, l->hidden,
                           l->across ? rows : l->hidden, l->across, l->up_scales < 0 ? NULL : slot + l->up_scales, l->coding, l->part};
}

static struct matrix down_of(const struct layout *l, const char *slot)
{
    return (struct matrix){slot + l->down, l->down_bias < 0 ? NULL : slot + l->down_bias, l->hidden, l->inner,
                           l->across ? l->hidden : l->inner, l->across, l->down_scales < 0 ? NULL : slot + l->down_scales, l->coding, l->hidden};
}

static INLINE long size_of(const int dtype)
{
    return dtype == FLOAT8 || dtype == EXPONENTS ? 1 : dtype == FLOAT32 ? 4 : 2;
}

static INLINE float half_number(const char *from)
{
    uint16_t half;
    memcpy(&half, from, 2);
    const int exponent = half >> 10 & 31, fraction = half & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                      : exponent ? ldexpf(1024 + fraction, exponent - 25) : ldexpf(fraction, -24);
    return half & 0x8000 ? -size : size;
}

/* Of what scales of integers and of eight-bit floats are stored as. */
static INLINE float stored_scale(const char *from, const int dtype)
{
    return dtype == FLOAT16 ? half_number(from) : number(from, dtype);
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

#include "products_coded.h"

#define PASTE(a, b) a##_##b
#define EXPAND(a, b) PASTE(a, b)

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
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
#include "products_coded_variant.h"
#include "products_delta_variant.h"
#include "products_conv_variant.h"
#include "products_scan_variant.h"
#undef NAME
#undef LANES
#undef BLOCK
#undef VECTORS
#pragma GCC target("avx512bf16")
#include "products_pairs.h"
#include "products_pairs_wide.h"
#include "products_pairs_many.h"
#include "products_pairs_prompt.h"
#include "products_pairs_attend.h"
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
#include "products_coded_variant.h"
#include "products_delta_variant.h"
#include "products_conv_variant.h"
#include "products_scan_variant.h"
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
#include "products_coded_variant.h"
#include "products_delta_variant.h"
#include "products_conv_variant.h"
#include "products_scan_variant.h"

typedef void (*attend_t)(const struct cache *, const struct seen *, int, const float *const *, float *, float *const *);
typedef void (*activate_t)(const struct layout *, float *);
typedef void (*expert_t)(const struct layout *, const char *, const char *, long, const long *, long, float *, float *);
typedef void (*many_t)(const struct matrix *, int, const char *, long, long, long, char *, float *);
typedef void (*delta_t)(const struct told *, float *, long, const char *, long, int, float *);
typedef void (*scan_t)(const struct told *, float *, long, const float *, float, float *, long);
typedef void (*convolve_t)(const struct convolution *, const float *, const float *, const char *, long, long, float *, char *);
typedef void (*end_t)(const float *, long, int, int, char *);
typedef void (*convert_t)(const struct conversion *, long, long);

static const struct {
    const char *name;
    multiply_t multiply;
    attend_t attend;
    activate_t activate;
    expert_t expert;
    convert_t convert;
    unpack_t unpack;
    many_t multiply_many;
    delta_t delta;
    scan_t scan;
    convolve_t convolve;
    end_t end;
    long rows; /* that `expert` and `multiply_many` take at a time */
    int pairs; /* 1: inputs for bfloat16 weights are bfloat16, too; 0: they are floats */
} sets[SETS] = {
#if SETS == 4
    {"AVX-512 BF16", multiply_pairs, attend_pairs, activate_pairs, expert_spread, convert_v4, unpack_pairs, multiply_many_v4, delta_v4, scan_v4, convolve_v4, end_v4, 32, 1},
    {"AVX-512", multiply_v4, attend_v4, activate_v4, expert_v4, convert_v4, unpack_v4, multiply_many_v4, delta_v4, scan_v4, convolve_v4, end_v4, 32, 0},
    {"AVX2", multiply_v3, attend_v3, activate_v3, expert_v3, convert_v3, unpack_v3, multiply_many_v3, delta_v3, scan_v3, convolve_v3, end_v3, 16, 0},
    {"SSE2", multiply_base, attend_base, activate_base, expert_base, convert_base, unpack_base, multiply_many_base, delta_base, scan_base, convolve_base, end_base, 8, 0},
#elif defined(__aarch64__)
    {"NEON", multiply_base, attend_base, activate_base, expert_base, convert_base, unpack_base, multiply_many_base, delta_base, scan_base, convolve_base, end_base, 16, 0},
#else
    {"portable", multiply_base, attend_base, activate_base, expert_base, convert_base, unpack_base, multiply_many_base, delta_base, scan_base, convolve_base, end_base, 8, 0},
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

static int check_set(int set)
{
    if (set >= 0 && set < SETS && runs_here(set))
        return 1;
    PyErr_Format(PyExc_ValueError, "no instruction set %d on this processor", set);
    return 0;
}

#include "products_shared.h"

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
    struct matrix m = {0};
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

#include "products_experts.h"
#include "products_many.h"

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

#include "products_attend.h"
#include "products_block.h"
#include "products_layer.h"
#include "products_convert.h"
#include "products_delta.h"
#include "products_scan.h"
#include "products_conv.h"
#if SETS == 4
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,avx512bf16")
#include "products_prompt.h"
#pragma GCC pop_options
#include "products_wide.h"
#endif

static PyMethodDef methods[] = {
    {"sets", py_sets, METH_NOARGS, "Instruction sets of this processor that the loops are compiled for, the best first."},
    {"tiles", py_tiles, METH_NOARGS, "Whether the processor multiplies tiles of bfloat16, which torch uses and we do not."},
    {"product", py_product, METH_VARARGS, "(set, dtype, x, weights, bias, y, rows, outputs, columns, stride, threads)"},
    {"experts", py_experts, METH_VARARGS, "(set, layout, bank, x, tokens, top_k, slots, y, threads)"},
    {"product_many", py_product_many, METH_VARARGS,
     "(set, dtype, x, weights, bias, y, rows, outputs, columns, room, its bytes, threads) -> bytes needed"},
    {"many", py_many, METH_VARARGS, "(set, layout, bank, slots of the bank, x, tokens, top_k, slots, y, room, its bytes, threads) -> bytes needed"},
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
#if SETS == 4
    {"wide", py_wide, METH_VARARGS, "(x, weights, bias, y, rows, outputs, columns, stride, room, its bytes, threads) -> bytes needed"},
    {"clear", py_clear, METH_VARARGS, "(mask, rows, new columns, columns, strides of rows and of new columns)"},
    {"attend_many", py_attend_many, METH_VARARGS,
     "(q, keys, values, mask, sinks, out, scale, new columns, stride of the mask's columns of them, (cache as `attend` has it), "
     "room, its bytes, threads) -> bytes needed"},
    {"prompt", py_prompt, METH_VARARGS,
     "(block, layer, states, cache and routing as `layer` has them, (new columns, strides of positions and mask from one to the "
     "next, which tokens count, index, whether they are routed, room, its bytes)) -> bytes needed"},
    {"ending", py_ending, METH_VARARGS,
     "(y, index, nobody in it, weights, weights dtype, x, shared as `shared` has it or None, what all is added to or 0, out, tokens, "
     "top_k, hidden, room, its bytes, threads) -> bytes needed"},
#endif
    {"delta", py_delta, METH_VARARGS,
     "(set, dtype, whether each number of a key has its decay, q, k, v, logarithms of decay, beta, state, out, (rows, tokens, heads "
     "of keys, heads, width of keys and of values), (strides of rows and tokens of q, k and v), scale, eps, threads)"},
    {"scan", py_scan, METH_VARARGS,
     "(set, dtype, x, k, q, steps, fading, skip, state, out, (rows, tokens, groups, heads, values, keys), (strides of rows and tokens "
     "of x, k and q), threads)"},
    {"convolve", py_convolve, METH_VARARGS,
     "(set, dtype, silu, x, weights, bias, out, (rows, tokens, channels, width), strides of rows and tokens of x, threads)"},
    {"convolve_step", py_convolve_step, METH_VARARGS,
     "(set, dtype, silu, x, state, weights, bias, out, (rows, channels, tokens of the state, width))"},
    {"convert", py_convert, METH_VARARGS,
     "(set, kind, stored, dtype of scales, scales, dtype, to, rows, columns, strides of rows and columns there, rows and columns "
     "of a block, threads)"},
    {"unpack", py_unpack, METH_VARARGS,
     "(set, dtype, numbers, scales, (way, dtype of scales, rows and columns that share one), rows of a part, to, rows, columns, "
     "threads): quantised weights"},
    {"norm", py_norm, METH_VARARGS, "(dtype, x, weights, out, rows, columns, eps)"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_products", "Matrix products and attention of few rows.", -1, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__products(void)
{
    return PyModule_Create(&module);
}
