/* The loops of products_convert.h for one instruction set, as products_variant.h has its own. No number below the normal
 * range of a float is ever multiplied to become one: that is slow, and wrong where the processor was told to drop them.
 */

typedef uint8_t NAME(bytes) __attribute__((vector_size(LANES)));
typedef int32_t NAME(integers) __attribute__((vector_size(4 * LANES)));

/* Of numbers with `mantissa` bits behind the point and an exponent that is biased by `bias`, whose magnitude lies in
 * `bits` as a float's would. */
static INLINE NAME(words) NAME(magnitude)(NAME(words) bits, const int bias)
{
    const NAME(words) normal = bits + ((uint32_t)(127 - bias) << 23);
    const NAME(words) one_up = bits + ((uint32_t)(128 - bias) << 23);
    NAME(floats) small;
    memcpy(&small, &one_up, sizeof small);
    const uint32_t least_bits = (uint32_t)(128 - bias) << 23; /* the smallest normal number */
    float least;
    memcpy(&least, &least_bits, sizeof least);
    small -= least;
    NAME(words) below;
    memcpy(&below, &small, sizeof below);
    const NAME(words) is_small = (NAME(words))(bits < (1u << 23));
    return (is_small & below) | (~is_small & normal);
}

static INLINE NAME(floats) NAME(eight_bits)(const char *from)
{
    NAME(bytes) codes;
    memcpy(&codes, from, sizeof codes);
    /* By way of halves: GCC takes a fourfold widening apart, number by number. */
    const NAME(words) code = __builtin_convertvector(__builtin_convertvector(codes, NAME(halves)), NAME(words));
    const NAME(words) size = code & 0x7f;
    const NAME(words) none = (NAME(words))(size == 0x7f); /* no number; there are no infinities */
    NAME(words) word = NAME(magnitude)(size << 20, 7);
    word = ((none & 0x7fc00000) | (~none & word)) | (code & 0x80) << 24;
    NAME(floats) v;
    memcpy(&v, &word, sizeof v);
    return v;
}

static INLINE NAME(floats) NAME(half_float)(const char *from)
{
    NAME(halves) codes;
    memcpy(&codes, from, sizeof codes);
    const NAME(words) code = __builtin_convertvector(codes, NAME(words)), size = code & 0x7fff;
    const NAME(words) endless = (NAME(words))(size >= 0x7c00); /* infinity, or no number */
    NAME(words) word = NAME(magnitude)(size << 13, 15);
    word = ((endless & (size << 13 | 0x7f800000)) | (~endless & word)) | (code & 0x8000) << 16;
    NAME(floats) v;
    memcpy(&v, &word, sizeof v);
    return v;
}

static INLINE NAME(floats) NAME(stored)(const char *from, const int kind)
{
    return kind == FLOAT8 ? NAME(eight_bits)(from) : kind == FLOAT16 ? NAME(half_float)(from) : NAME(weights)(from, kind);
}

/* Rounds as `put` does. */
static INLINE NAME(halves) NAME(rounded_halves)(NAME(floats) v)
{
    NAME(words) word;
    memcpy(&word, &v, sizeof word);
    const NAME(words) none = (NAME(words))(v != v);
    word = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
    return __builtin_convertvector((none & 0x7fc0) | (~none & word), NAME(halves));
}

/* `count` numbers, LANES at most. */
static INLINE void NAME(give)(NAME(floats) v, char *to, const int dtype, long count, long step)
{
    const NAME(halves) narrow = NAME(rounded_halves)(v);
    const char *from = dtype == FLOAT32 ? (const char *)&v : (const char *)&narrow;
    const long size = dtype == FLOAT32 ? 4 : 2;
    if (step == 1)
        memcpy(to, from, count * size);
    else
        for (long i = 0; i < count; i++)
            memcpy(to + i * step * size, from + i * size, size);
}

/* Neighbours from `first` up to `last`, times one scale, or as they are. */
static INLINE void NAME(some)(const int kind, const int dtype, const long step, const char *from,
                              char *to, long first, long last, const float *scale)
{
    const long read = size_of(kind), written = size_of(dtype);
    const float times = scale ? *scale : 1;
    long i = first;
    for (; i + LANES <= last; i += LANES) {
        const NAME(floats) v = NAME(stored)(from + i * read, kind);
        NAME(give)(scale ? v * times : v, to + i * step * written, dtype, LANES, step);
    }
    if (i < last) {
        char rest[4 * LANES] = {0};
        memcpy(rest, from + i * read, (last - i) * read);
        const NAME(floats) v = NAME(stored)(rest, kind);
        NAME(give)(scale ? v * times : v, to + i * step * written, dtype, last - i, step);
    }
}

static INLINE void NAME(row)(const struct conversion *c, const int kind, const int dtype, const long step, long row)
{
    const char *from = c->from + row * c->columns * size_of(kind), *scales = scales_of(c, row);
    char *to = c->to + row * c->to_row * size_of(dtype);
    if (!scales) {
        NAME(some)(kind, dtype, step, from, to, 0, c->columns, NULL);
        return;
    }
    for (long first = 0; first < c->columns; first += c->block_columns, scales += size_of(c->scales_dtype)) {
        const float scale = number(scales, c->scales_dtype);
        const long last = first + c->block_columns;
        NAME(some)(kind, dtype, step, from, to, first, last < c->columns ? last : c->columns, &scale);
    }
}

/* Rows `first` to `last`; what goes where is known to the compiler for neighbours that stay neighbours. */
static void NAME(convert)(const struct conversion *c, long first, long last)
{
#define EACH(kind_, dtype_)                                \
    if (c->kind == kind_ && c->dtype == dtype_) {          \
        for (long row = first; row < last; row++) {        \
            if (c->to_column == 1)                         \
                NAME(row)(c, kind_, dtype_, 1, row);       \
            else                                           \
                NAME(row)(c, kind_, dtype_, c->to_column, row); \
        }                                                  \
    }
    EACH(FLOAT8, BFLOAT16)
    EACH(FLOAT8, FLOAT32)
    EACH(FLOAT32, BFLOAT16)
    EACH(FLOAT16, BFLOAT16)
#undef EACH
}
