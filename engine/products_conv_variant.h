/* The loops of products_conv.h for one instruction set; included with products_variant.h. */

/* To bfloat16 and back, as `put` rounds. */
static INLINE NAME(floats) NAME(as_half)(NAME(floats) x)
{
    const NAME(halves) h = NAME(rounded_halves)(x);
    return NAME(weights)((const char *)&h, BFLOAT16);
}

static INLINE NAME(floats) NAME(convolved)(NAME(floats) x, const int silu, const int dtype)
{
    if (dtype != FLOAT32)
        x = NAME(as_half)(x);
    if (silu) {
        x = NAME(silu)(x, 1);
        if (dtype != FLOAT32)
            x = NAME(as_half)(x);
    }
    return x;
}

/* Sums of some channels, as many as a vector, or fewer at the end. */
static INLINE void NAME(end_channels)(const float *sums, long channels, const int silu, const int dtype, char *out)
{
    for (long i = 0; i < channels; i += LANES) {
        float some[LANES] = {0};
        const long count = channels - i < LANES ? channels - i : LANES;
        memcpy(some, sums + i, count * sizeof(float));
        NAME(give)(NAME(convolved)(NAME(load)(some), silu, dtype), out + i * size_of(dtype), dtype, count, 1);
    }
}

static INLINE void NAME(convolve_token)(const struct convolution *c, const float *weights, const float *bias, const char *x,
                                        long token, float *sums, char *out, const int dtype)
{
    const long size = dtype == FLOAT32 ? 4 : 2, first = c->width - 1 - token;
    memcpy(sums, bias, c->channels * sizeof(float));
    for (long j = first > 0 ? first : 0; j < c->width; j++) {
        const char *from = x + (token - c->width + 1 + j) * c->x_token * size;
        const float *by = weights + j * c->channels;
        long i = 0;
        for (; i + LANES <= c->channels; i += LANES) {
            const NAME(floats) all = NAME(load)(sums + i) + NAME(load)(by + i) * NAME(weights)(from + i * size, dtype);
            memcpy(sums + i, &all, sizeof all);
        }
        for (; i < c->channels; i++)
            sums[i] += by[i] * number(from + i * size, dtype);
    }
    NAME(end_channels)(sums, c->channels, c->silu, dtype, out);
}

/* A row's tokens `first` to `last`; `sums` are one thread's. */
static void NAME(convolve)(const struct convolution *c, const float *weights, const float *bias, const char *x, long first,
                           long last, float *sums, char *out)
{
    for (long token = first; token < last; token++)
        if (c->dtype == FLOAT32)
            NAME(convolve_token)(c, weights, bias, x, token, sums, out + token * c->channels * 4, FLOAT32);
        else
            NAME(convolve_token)(c, weights, bias, x, token, sums, out + token * c->channels * 2, BFLOAT16);
}

static void NAME(end)(const float *sums, long channels, int silu, int dtype, char *out)
{
    if (dtype == FLOAT32)
        NAME(end_channels)(sums, channels, silu, FLOAT32, out);
    else
        NAME(end_channels)(sums, channels, silu, BFLOAT16, out);
}
