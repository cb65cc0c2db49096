/* Causal convolutions of each channel by itself, over the last few tokens. Included by products.c. */

/* x [rows, tokens, channels] with channels in one piece -> out [rows, tokens, channels]; before the first token are zeros. */
static PyObject *py_convolve(PyObject *self, PyObject *args)
{
    int set, threads;
    struct convolution c;
    unsigned long long x, weights, bias, out;
    long rows, tokens, x_row;
    if (!PyArg_ParseTuple(args, "iiiKKKK(llll)lli", &set, &c.dtype, &c.silu, &x, &weights, &bias, &out, &rows, &tokens, &c.channels,
                          &c.width, &x_row, &c.x_token, &threads) || !check_set(set))
        return NULL;
    const long size = size_of(c.dtype), all = rows * tokens;
    threads = threads_for(all * c.channels * size * c.width, threads);
    float *room = malloc(sizeof(float) * c.channels * (c.width + 1 + threads));
    if (!room)
        return PyErr_NoMemory();
    float *biases = room + c.channels * c.width;
    Py_BEGIN_ALLOW_THREADS
    for (long i = 0; i < c.channels; i++) { /* turned over: [width, channels] */
        biases[i] = bias ? number((const char *)bias + i * size, c.dtype) : 0;
        for (long j = 0; j < c.width; j++)
            room[j * c.channels + i] = number((const char *)weights + (i * c.width + j) * size, c.dtype);
    }
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const int part = omp_get_thread_num(), parts = omp_get_num_threads();
        float *sums = biases + c.channels * (1 + part);
        for (long row = 0; row < rows; row++)
            sets[set].convolve(&c, room, biases, (const char *)x + row * x_row * size, share(tokens, part, parts),
                               share(tokens, part + 1, parts), sums, (char *)out + row * tokens * c.channels * size);
    }
    Py_END_ALLOW_THREADS
    free(room);
    Py_RETURN_NONE;
}

/* One token a row: x [rows, channels], state [rows, channels, seen], which moves on by it -> out [rows, channels]. */
static PyObject *py_convolve_step(PyObject *self, PyObject *args)
{
    int set, dtype, silu;
    unsigned long long x, state, weights, bias, out;
    long rows, channels, seen, width;
    if (!PyArg_ParseTuple(args, "iiiKKKKK(llll)", &set, &dtype, &silu, &x, &state, &weights, &bias, &out, &rows, &channels, &seen,
                          &width) || !check_set(set))
        return NULL;
    const long size = size_of(dtype);
    float *sums = malloc(sizeof(float) * channels);
    if (!sums)
        return PyErr_NoMemory();
    Py_BEGIN_ALLOW_THREADS
    for (long row = 0; row < rows; row++) {
        for (long i = 0; i < channels; i++) {
            char *past = (char *)state + (row * channels + i) * seen * size;
            const char *by = (const char *)weights + i * width * size;
            float sum = bias ? number((const char *)bias + i * size, dtype) : 0;
            /* The tokens before it: those that the state has, up to one fewer than the weights. */
            for (long j = 0; j + 1 < width; j++)
                if (seen - width + 1 + j >= 0)
                    sum += number(by + j * size, dtype) * number(past + (seen - width + 1 + j) * size, dtype);
            const char *now = (const char *)x + (row * channels + i) * size;
            sum += number(by + (width - 1) * size, dtype) * number(now, dtype);
            memmove(past, past + size, (seen - 1) * size);
            memcpy(past + (seen - 1) * size, now, size);
            sums[i] = sum;
        }
        sets[set].end(sums, channels, silu, dtype, (char *)out + row * channels * size);
    }
    Py_END_ALLOW_THREADS
    free(sums);
    Py_RETURN_NONE;
}
