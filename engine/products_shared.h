/* A shared expert: every token goes to it, beside those that are chosen for it. Its three matrices lie apart, and where
 * there is one more product, the sigmoid of that says how much of the output counts.
 */

struct shared {
    struct matrix gate, up, down, share; /* `share` [1, hidden]; without weights all of the output counts */
    struct layout inside;                /* what `activate` asks for */
};

/* The rows of one call, as pointers to floats: what goes in, gate and up behind it, the output, the share. */
struct sharing {
    const struct shared *shared;
    long rows; /* 0 where a layer has no shared expert */
    const float **inputs;
    float **gates, **ups, **outputs, **shares;
};

/* Room for one call in one piece, pointers first. NULL where there is no memory. */
static char *lay_out_shared(struct sharing *c, const struct shared *s, long rows)
{
    const long inner = s->inside.inner, hidden = s->inside.hidden;
    const long step = pitch(2 * inner) + pitch(hidden + 1);
    char *room = malloc(rows * (5 * sizeof(float *) + sizeof(float) * step) + LINE);
    if (!room)
        return NULL;
    *c = (struct sharing){s, s->down.weights ? rows : 0, (const float **)room};
    c->gates = (float **)(c->inputs + rows);
    c->ups = c->gates + rows;
    c->outputs = c->ups + rows;
    c->shares = c->outputs + rows;
    float *numbers = aligned((float *)(c->shares + rows));
    for (long row = 0; row < c->rows; row++, numbers += step) {
        c->gates[row] = numbers;
        c->ups[row] = numbers + inner;
        c->outputs[row] = numbers + pitch(2 * inner);
        c->shares[row] = c->outputs[row] + hidden;
    }
    return room;
}

static void take_in(const struct sharing *c, const float *wide)
{
    for (long row = 0; row < c->rows; row++)
        c->inputs[row] = wide + row * pitch(c->shared->inside.hidden);
}

static long shared_bytes(const struct sharing *c)
{
    const struct layout *l = &c->shared->inside;
    return c->rows ? 3 * l->hidden * l->inner * (l->dtype == FLOAT32 ? 4 : 2) : 0;
}

static void multiply_part(multiply_t multiply, const struct matrix *m, int dtype, const float **inputs, long rows,
                          float **outputs, int part, int parts)
{
    multiply(m, dtype, (const float *const *)inputs, rows, outputs, share(m->rows, part, parts),
             share(m->rows, part + 1, parts));
}

/* One thread's part of the way in; its part of the way out is for when all have ended this and `activate_shared`. */
static void shared_in(multiply_t multiply, const struct sharing *c, int part, int parts)
{
    if (!c->rows)
        return;
    const struct shared *s = c->shared;
    const int dtype = s->inside.dtype;
    multiply_part(multiply, &s->gate, dtype, c->inputs, c->rows, c->gates, part, parts);
    multiply_part(multiply, &s->up, dtype, c->inputs, c->rows, c->ups, part, parts);
    if (s->share.weights)
        multiply_part(multiply, &s->share, dtype, c->inputs, c->rows, c->shares, part, parts);
}

static void activate_shared(activate_t activate, const struct sharing *c, int part, int parts)
{
    for (long row = share(c->rows, part, parts); row < share(c->rows, part + 1, parts); row++)
        activate(&c->shared->inside, c->gates[row]);
}

static void shared_out(multiply_t multiply, const struct sharing *c, int part, int parts)
{
    if (c->rows)
        multiply_part(multiply, &c->shared->down, c->shared->inside.dtype, (const float **)c->gates, c->rows, c->outputs, part,
                      parts);
}

static float rounded(float value, int dtype)
{
    char held[4];
    put(held, value, dtype);
    return number(held, dtype);
}

/* to [rows, hidden] += the output, or its share of it, rounded where a module of transformers rounds. */
static void add_shared(const struct sharing *c, char *to)
{
    for (long row = 0; row < c->rows; row++) {
        const struct layout *l = &c->shared->inside;
        const int dtype = l->dtype, all = !c->shared->share.weights;
        const float weight = all ? 1 : rounded(1 / (1 + expf(-rounded(c->shares[row][0], dtype))), dtype);
        for (long i = 0; i < l->hidden; i++, to += dtype == FLOAT32 ? 4 : 2) {
            const float output = rounded(c->outputs[row][i], dtype);
            put(to, number(to, dtype) + (all ? output : rounded(weight * output, dtype)), dtype);
        }
    }
}

/* None: there is no shared expert. */
static int parse_shared(PyObject *fields, struct shared *s)
{
    unsigned long long w[4], bias[4];
    struct layout *l = &s->inside;
    memset(s, 0, sizeof *s);
    if (fields == Py_None)
        return 1;
    if (!PyTuple_Check(fields)) {
        PyErr_SetString(PyExc_TypeError, "a shared expert is a tuple of its fields, or None");
        return 0;
    }
    if (!PyArg_ParseTuple(fields, "iiKKKKKKKKll", &l->dtype, &l->activation, w, bias, w + 1, bias + 1, w + 2, bias + 2, w + 3,
                          bias + 3, &l->hidden, &l->inner))
        return 0;
    l->gated = 1;
    s->gate = (struct matrix){(const char *)w[0], (const char *)bias[0], l->inner, l->hidden, l->hidden};
    s->up = (struct matrix){(const char *)w[1], (const char *)bias[1], l->inner, l->hidden, l->hidden};
    s->down = (struct matrix){(const char *)w[2], (const char *)bias[2], l->hidden, l->inner, l->inner};
    s->share = (struct matrix){(const char *)w[3], (const char *)bias[3], 1, l->hidden, l->hidden};
    return 1;
}
