/* Inputs into panels, both ways: by feature, as the forward product reads them, and by
 * sample, as the gradient of the weight does. Blocks of 16 samples and features stay in
 * registers or in the nearest cache between the two. Padding up to a panel's end is +0:
 * products add whole panels. */

typedef uint8_t Bytes __attribute__((vector_size(16)));

INLINE Bytes load_bytes(const uint8_t *p) {
    Bytes x;
    memcpy(&x, p, 16);
    return x;
}

#if defined(__aarch64__)
INLINE Bytes zip_low_bytes(Bytes a, Bytes b) {
    return (Bytes)vzip1q_u8((uint8x16_t)a, (uint8x16_t)b);
}
INLINE Bytes zip_high_bytes(Bytes a, Bytes b) {
    return (Bytes)vzip2q_u8((uint8x16_t)a, (uint8x16_t)b);
}
INLINE Lanes widen(Bytes x) {
    uint16x8_t low = vmovl_u8(vget_low_u8((uint8x16_t)x));
    uint16x8_t high = vmovl_u8(vget_high_u8((uint8x16_t)x));
    return (Lanes){{(vf)vcvtq_f32_u32(vmovl_u16(vget_low_u16(low))),
                    (vf)vcvtq_f32_u32(vmovl_u16(vget_high_u16(low))),
                    (vf)vcvtq_f32_u32(vmovl_u16(vget_low_u16(high))),
                    (vf)vcvtq_f32_u32(vmovl_u16(vget_high_u16(high)))}};
}
#else
INLINE Bytes zip_low_bytes(Bytes a, Bytes b) {
    return (Bytes)_mm_unpacklo_epi8((__m128i)a, (__m128i)b);
}
INLINE Bytes zip_high_bytes(Bytes a, Bytes b) {
    return (Bytes)_mm_unpackhi_epi8((__m128i)a, (__m128i)b);
}
/* Sixteen bytes as floats. */
INLINE Lanes widen(Bytes x) {
    __m128i b = (__m128i)x;
#if VW == 16
    return (Lanes){{to_float((vi)_mm512_cvtepu8_epi32(b))}};
#elif VW == 8
    return (Lanes){{to_float((vi)_mm256_cvtepu8_epi32(b)),
                    to_float((vi)_mm256_cvtepu8_epi32(_mm_srli_si128(b, 8)))}};
#else
    return (Lanes){{to_float((vi)_mm_cvtepu8_epi32(b)),
                    to_float((vi)_mm_cvtepu8_epi32(_mm_srli_si128(b, 4))),
                    to_float((vi)_mm_cvtepu8_epi32(_mm_srli_si128(b, 8))),
                    to_float((vi)_mm_cvtepu8_epi32(_mm_srli_si128(b, 12)))}};
#endif
}
#endif

/* As transpose_block, for bytes. */
INLINE void transpose_bytes(Bytes block[16]) {
    UNROLL for (int round = 0; round < 4; round++) {
        Bytes zipped[16];
        UNROLL for (int j = 0; j < 8; j++) {
            zipped[2 * j] = zip_low_bytes(block[j], block[j + 8]);
            zipped[2 * j + 1] = zip_high_bytes(block[j], block[j + 8]);
        }
        UNROLL for (int j = 0; j < 16; j++) block[j] = zipped[j];
    }
}

INLINE void store_lanes(float *p, Lanes lanes) {
    for (int j = 0; j < LANES / VW; j++) store(p + j * VW, lanes.part[j]);
}

/* What the bytes of a call become: the layouts (or NULL), and how. */
typedef struct {
    const Call *call;
    float *by_feature, *by_sample;
    int64_t features, samples;
    int64_t per_channel; /* features of a channel */
    const float *scale, *offset;
} Gather;

/* Sixteen features' scales and offsets, beginning with feature f. */
typedef struct {
    float scale[LANES], offset[LANES];
} Channels;

INLINE Channels channels_at(const Gather *g, int64_t f) {
    Channels channels;
    int64_t channel = f / g->per_channel, left = (channel + 1) * g->per_channel - f;
    for (int l = 0; l < LANES; l++, left--) {
        if (left == 0) channel++, left = g->per_channel;
        int is_there = f + l < g->features;
        channels.scale[l] = is_there ? g->scale[channel] : 0;
        channels.offset[l] = is_there ? g->offset[channel] : 0;
    }
    return channels;
}

/* Bytes [f, f + 16) of sixteen rows; what is not there is 0. */
INLINE void load_block(const Gather *g, const uint8_t *const *rows, int64_t f,
                       Bytes block[16]) {
    int64_t n = g->features - f;
    UNROLL for (int j = 0; j < 16; j++) {
        block[j] = (Bytes){0};
        if (n >= 16 && rows[j])
            block[j] = load_bytes(rows[j] + f);
        else if (n > 0 && rows[j])
            memcpy(&block[j], rows[j] + f, (size_t)n);
    }
}

INLINE void store_by_sample(const Gather *g, int64_t s, int64_t f,
                            const Channels *channels, const Bytes block[16]) {
    int64_t rows = smaller(16, g->samples - s);
    float *to =
        g->by_sample + (f / PANEL * g->call->capacity + s) * PANEL + f % PANEL;
    Lanes scale = lanes_at(channels->scale), offset = lanes_at(channels->offset);
    for (int64_t j = 0; j < rows; j++) {
        Lanes x = widen(block[j]);
        for (int k = 0; k < LANES / VW; k++)
            x.part[k] = x.part[k] * scale.part[k] - offset.part[k];
        store_lanes(to + j * PANEL, x);
    }
}
INLINE void store_by_feature(const Gather *g, int64_t s, int64_t f,
                             const Channels *channels, Bytes block[16]) {
    transpose_bytes(block);
    int64_t rows = smaller(16, g->features - f);
    float *to = g->by_feature + (s / PANEL * g->features + f) * PANEL + s % PANEL;
    int64_t samples = smaller(LANES, g->samples - s);
    for (int64_t j = 0; j < rows; j++) {
        Lanes x = widen(block[j]);
        for (int k = 0; k < LANES / VW; k++)
            x.part[k] = x.part[k] * channels->scale[j] - channels->offset[j];
        store_lanes(to + j * PANEL, samples < LANES ? first_of(x, samples) : x);
    }
}

/* The panel of samples [s, s + 32), whose rows of bytes are `rows` or NULL. */
static void gather_panel(const Gather *g, int64_t s, const uint8_t *const *rows) {
    int64_t panels = parts_of(g->features, PANEL);
    int64_t end = g->by_sample ? panels * PANEL : g->features;
    for (int64_t f = 0; f < end; f += LANES) {
        Channels channels = channels_at(g, f);
        for (int64_t half = 0; half < PANEL; half += LANES) {
            Bytes block[16];
            load_block(g, rows + half, f, block);
            if (g->by_sample && s + half < g->samples)
                store_by_sample(g, s + half, f, &channels, block);
            if (g->by_feature && f < g->features)
                store_by_feature(g, s + half, f, &channels, block);
        }
    }
}

/* Rows lie anywhere in memory: ask for all of a panel's before using the first, one
 * line of every row after the other, so that pages are looked up at the same time. */
static void prefetch_rows(const Gather *g, const uint8_t *const *rows) {
    for (int64_t i = 0; i < g->features; i += 64)
        for (int64_t j = 0; j < PANEL; j++)
            if (rows[j]) __builtin_prefetch(rows[j] + i);
}

INLINE float *buffer_or_null(const Call *call, int64_t number) {
    return number < 0 ? NULL : call->buffers[number];
}

static void op_gather_bytes(const Op *op, const Call *call) {
    Gather g = {.call = call,
                .by_feature = buffer_or_null(call, op->i[0]),
                .by_sample = buffer_or_null(call, op->i[1]),
                .features = op->i[2],
                .samples = num_samples(call),
                .per_channel = op->i[2] / op->i[3],
                .scale = call->buffers[op->i[4]],
                .offset = call->buffers[op->i[5]]};
    for (int64_t s = 0; s < g.samples; s += PANEL) {
        const uint8_t *rows[PANEL] = {NULL};
        for (int64_t j = 0; j < PANEL && s + j < g.samples; j++)
            rows[j] = call->bytes + call->indices[s + j] * g.features;
        prefetch_rows(&g, rows);
        gather_panel(&g, s, rows);
    }
}

/* Columns [c, c + VW) of a row of `size` floats; +0 beyond. */
INLINE vf load_row(const float *row, int64_t c, int64_t size) {
    if (c + VW <= size) return load(row + c);
    return c < size ? load_part(row + c, size - c) : (vf){0};
}

/* Samples [s, s + VW) at features [f, f + VW), of a matrix with rows of `columns`. */
static void load_floats(const Gather *g, const float *x, int64_t columns, int64_t s,
                        int64_t f) {
    vf block[VW];
    for (int64_t j = 0; j < VW; j++) {
        block[j] = (vf){0};
        if (s + j >= g->samples) continue;
        block[j] = load_row(x + (s + j) * columns, f, g->features);
        if (g->by_sample)
            store(g->by_sample + (f / PANEL * g->call->capacity + s + j) * PANEL +
                      f % PANEL,
                  block[j]);
    }
    if (!g->by_feature) return;
    transpose_block(block);
    for (int64_t j = 0; j < VW && f + j < g->features; j++)
        store(g->by_feature + (s / PANEL * g->features + f + j) * PANEL + s % PANEL,
              block[j]);
}

static void op_load(const Op *op, const Call *call) {
    Gather g = {.call = call,
                .by_feature = buffer_or_null(call, op->i[0]),
                .by_sample = buffer_or_null(call, op->i[1]),
                .features = op->i[2],
                .samples = num_samples(call)};
    int64_t last = parts_of(g.samples, PANEL) * PANEL;
    int64_t end = parts_of(g.features, PANEL) * PANEL;
    int64_t columns = op->i[4] ? op->i[4] : g.features;
    const float *x = (op->i[5] ? call->targets : call->inputs) + op->i[3];
    for (int64_t s = 0; s < last; s += VW)
        for (int64_t f = 0; f < end; f += VW) load_floats(&g, x, columns, s, f);
}
