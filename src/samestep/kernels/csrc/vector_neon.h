/* aarch64: what vector.h declares. */
INLINE vf load_part(const float *p, int64_t n) {
    float lanes[VW] = {0};
    for (int64_t i = 0; i < n; i++) lanes[i] = p[i];
    return load(lanes);
}
INLINE void store_part(float *p, vf x, int64_t n) {
    float lanes[VW];
    store(lanes, x);
    for (int64_t i = 0; i < n; i++) p[i] = lanes[i];
}
INLINE vf fma_(vf a, vf b, vf c) {
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
INLINE vf sqrt_(vf x) { return (vf)vsqrtq_f32((float32x4_t)x); }
INLINE vf zip_low(vf a, vf b) {
    return (vf)vzip1q_f32((float32x4_t)a, (float32x4_t)b);
}
INLINE vf zip_high(vf a, vf b) {
    return (vf)vzip2q_f32((float32x4_t)a, (float32x4_t)b);
}
INLINE vq mul_even(vu a, vu b) {
    return (vq)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
}
