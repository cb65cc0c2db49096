/* What is stored becomes what is served: FP8 times the scale of its block, or one float as another; to the bit as torch does
 * it, but for the bits of what is no number. The loops are in products_convert_variant.h.
 */

static void convert_all(convert_t convert, const struct conversion *c, int threads)
{
    threads = threads_for(c->rows * c->columns * size_of(c->kind), threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        convert(c, share(c->rows, part, parts), share(c->rows, part + 1, parts));
    }
}

static PyObject *py_convert(PyObject *self, PyObject *args)
{
    int set, threads;
    unsigned long long from, scales, to;
    struct conversion c;
    if (!PyArg_ParseTuple(args, "iiKiKiKlllllli", &set, &c.kind, &from, &c.scales_dtype, &scales, &c.dtype, &to, &c.rows,
                          &c.columns, &c.to_row, &c.to_column, &c.block_rows, &c.block_columns, &threads) ||
        !check_set(set))
        return NULL;
    c.from = (const char *)from, c.scales = (const char *)scales, c.to = (char *)to;
    Py_BEGIN_ALLOW_THREADS
    convert_all(sets[set].convert, &c, threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

/* numbers and scales of a quantised matrix -> to [rows, columns]. */
static PyObject *py_unpack(PyObject *self, PyObject *args)
{
    int set, dtype, threads;
    unsigned long long numbers, scales, to;
    struct matrix m = {0};
    if (!PyArg_ParseTuple(args, "iiKK(iill)lKlli", &set, &dtype, &numbers, &scales, &m.coding.way, &m.coding.dtype,
                          &m.coding.rows, &m.coding.columns, &m.part, &to, &m.rows, &m.columns, &threads) || !check_set(set))
        return NULL;
    m.weights = (const char *)numbers, m.scales = (const char *)scales;
    threads = threads_for(m.rows * coded_row(&m), threads);
    Py_BEGIN_ALLOW_THREADS
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        const long first = share(m.rows, part, parts), count = share(m.rows, part + 1, parts) - first;
        sets[set].unpack(&m, dtype, first, count, (char *)to + first * m.columns * size_of(dtype));
    }
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
