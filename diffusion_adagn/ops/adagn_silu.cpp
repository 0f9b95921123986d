// y = silu((x - mean) * rstd * gain + shift), and its gradients; mean and rstd over the pixels and channels of a group.
//
// x [N, C, P] lies pixel by pixel ("last": the channels of a pixel lie together) or channel by channel. Every
// sum and every step between load and store is in float32 or wider. Each (image, group) is computed by one thread, so
// that the result does not depend on how many threads there are. No header but C's integers
// and allocation: it is compiled where it is used, in about a second.

#include <stdint.h>
#include <stdlib.h>

namespace {

struct bf16 {
    uint16_t bits;
};

template <class To, class From> inline To as(From from) {
    To to;
    static_assert(sizeof(to) == sizeof(from), "");
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

inline float load(float value) { return value; }
inline float load(bf16 value) { return as<float>(uint32_t(value.bits) << 16); }
inline void store(float *to, float value) { *to = value; }
inline void store(bf16 *to, float value) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits = as<uint32_t>(value);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    to->bits = uint16_t(value != value ? 0x7fc0 : rounded);
}

// a * b + c; where it is fused is said here, not left to the compiler, which would fuse a loop's end otherwise than its body
inline float fma(float a, float b, float c) {
#ifdef __FP_FAST_FMAF
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// exp = 2^k e^r with |r| <= ln(2) / 2, e^r by a polynomial fitted at Chebyshev's points: 2e-7 of the value
// for |x| <= 87
inline float exponential(float x) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    float shifted = fma(x, 1.44269504f, magic);
    float k = shifted - magic;
    float r = fma(k, -1.42860677e-6f, fma(k, -0.693145752f, x));  // ln 2 in two parts
    float p = 1.394471253e-3f;
    p = fma(p, r, 8.371989545e-3f);
    p = fma(p, r, 4.166627879e-2f);
    p = fma(p, r, 1.666645503e-1f);
    p = fma(p, r, 5.000000085e-1f);
    p = fma(p, r, 1.000000028f);
    p = fma(p, r, 1.0f);
    return p * as<float>((as<int32_t>(shifted) - as<int32_t>(magic) + 127) << 23);
}

// silu(z) = z / (1 + exp(-z)) is 0 below -87, to float's last digit
const float least = -87.0f;

inline float at_least(float z) { return z < least ? least : z; }

// for z >= least
inline float sigmoid(float z) { return 1.0f / (1.0f + exponential(-(z > 87.0f ? 87.0f : z))); }

inline float median(float a, float b, float c) {
    const float low = a < b ? a : b, high = a < b ? b : a;
    return c < low ? low : c < high ? c : high;
}

// A thread's numbers for a block: two rows of doubles, then rows of floats.
struct Scratch {
    double *wide;
    float *narrow;
    Scratch(long width, long floats) {
        wide = (double *)malloc(width * (2 * sizeof(double) + floats * sizeof(float)));
        narrow = (float *)(wide + 2 * width);
    }
    ~Scratch() { free(wide); }
};

// Room of this thread's for so many floats, and never more than 4 MiB; null if there is none.
inline float *keeper(bf16 *, long numbers) {
    static thread_local float *room = nullptr;
    static thread_local long size = 0;
    if (numbers > 1 << 20) return nullptr;
    if (numbers > size) {
        free(room);
        room = (float *)malloc(numbers * sizeof(float));
        size = room ? numbers : 0;
    }
    return room;
}
inline float *keeper(float *out, long) { return out; }

// Where a block of `width` channels lies: P pixels, `stride` numbers from one to the next where the channels lie together.
struct Block {
    long P, stride, width;
};

// f(place, channel of the block) for every number of the block.
template <bool last, class F> inline void each(Block b, F f) {
    if (last)
        for (long p = 0; p < b.P; p++) {
#pragma omp simd
            for (long c = 0; c < b.width; c++) f(p * b.stride + c, c);
        }
    else
        for (long c = 0; c < b.width; c++) {
#pragma omp simd
            for (long p = 0; p < b.P; p++) f(c * b.P + p, c);
        }
}

// u and v of f(place, channel, u, v), summed over the pixels of each channel: in float over 256 pixels, then in double.
// part: 2 * width floats of scratch.
template <bool last, class F> inline void sums(Block b, float *part, double *U, double *V, F f) {
    const long most = 256;
    for (long c = 0; c < b.width; c++) U[c] = V[c] = 0;
    if (last) {
        float *su = part, *sv = part + b.width;
        for (long start = 0; start < b.P; start += most) {
            long end = start + most < b.P ? start + most : b.P, p = start;
            for (long c = 0; c < 2 * b.width; c++) part[c] = 0;
            for (; p + 3 < end; p += 4) {  // four at a time: the sums are loaded and stored a quarter as often
                const long at = p * b.stride;
#pragma omp simd
                for (long c = 0; c < b.width; c++) {
                    float u0, v0, u1, v1, u2, v2, u3, v3;
                    f(at + c, c, u0, v0);
                    f(at + b.stride + c, c, u1, v1);
                    f(at + 2 * b.stride + c, c, u2, v2);
                    f(at + 3 * b.stride + c, c, u3, v3);
                    su[c] += (u0 + u1) + (u2 + u3);
                    sv[c] += (v0 + v1) + (v2 + v3);
                }
            }
            for (; p < end; p++) {
#pragma omp simd
                for (long c = 0; c < b.width; c++) {
                    float u, v;
                    f(p * b.stride + c, c, u, v);
                    su[c] += u;
                    sv[c] += v;
                }
            }
            for (long c = 0; c < b.width; c++) U[c] += su[c], V[c] += sv[c];
        }
    } else
        for (long c = 0; c < b.width; c++)
            for (long start = 0; start < b.P; start += most) {
                long end = start + most < b.P ? start + most : b.P;
                float su = 0, sv = 0;
#pragma omp simd reduction(+ : su, sv)
                for (long p = start; p < end; p++) {
                    float u, v;
                    f(c * b.P + p, c, u, v);
                    su += u;
                    sv += v;
                }
                U[c] += su, V[c] += sv;
            }
}

// Channels dealt out so that every thread has work: blocks of whole groups, one per image where there are enough images.
struct Cut {
    long blocks, groups;
    Cut(long N, long G, long threads) {
        long wanted = N >= threads ? 1 : (threads + N - 1) / N;
        groups = (G + wanted - 1) / wanted;
        blocks = (G + groups - 1) / groups;
    }
};

template <class T, bool last, bool silu>
void forward(const T *x, T *y, const float *gain, const float *shift, float *mean, float *rstd, long N, long C, long P,
             long G, long rows, double eps, int threads) {
    const long D = C / G;
    const Cut cut(N, G, threads);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (long n = 0; n < N; n++)
        for (long block = 0; block < cut.blocks; block++) {
            const long g0 = block * cut.groups, g1 = g0 + cut.groups < G ? g0 + cut.groups : G, c0 = g0 * D;
            const Block b{P, C, (g1 - g0) * D};
            const long first = n * C * P + (last ? c0 : c0 * P);
            const T *in = x + first;
            T *out = y + first;
            const Scratch scratch(b.width, 5);
            float *origin = scratch.narrow, *middle = origin + b.width, *scale = middle + b.width,
                  *part = scale + b.width;
            double *S = scratch.wide, *Q = S + b.width;

            // deviations from a typical pixel: squares of a far-off mean would swallow the variance
            for (long c = 0; c < b.width; c++) {
                auto at = [&](long p) { return load(in[last ? p * b.stride + c : c * P + p]); };
                origin[c] = median(at(3 * P / 7), at(5 * P / 11), at(8 * P / 13));
            }
            sums<last>(b, part, S, Q, [=](long i, long c, float &u, float &v) {
                u = load(in[i]) - origin[c];
                v = u * u;
            });
            for (long g = g0; g < g1; g++) {
                const long from = (g - g0) * D;
                double sum = 0, squares = 0;
                for (long c = from; c < from + D; c++) sum += origin[c] + S[c] / P;
                const double m = sum / D;
                for (long c = from; c < from + D; c++) {
                    const double own = S[c] / P, apart = origin[c] + own - m;
                    squares += Q[c] - S[c] * own + P * apart * apart;
                }
                const double variance = squares / (double(D) * P);
                const float r = float(1.0 / __builtin_sqrt((variance > 0 ? variance : variance * 0) + eps));
                mean[n * G + g] = float(m);
                rstd[n * G + g] = r;
                for (long c = from; c < from + D; c++) {
                    middle[c] = float(m);
                    scale[c] = r * gain[(rows > 1 ? n * C : 0) + c0 + c];
                }
            }
            const float *move = shift + (rows > 1 ? n * C : 0) + c0;
            each<last>(b, [=](long i, long c) {
                const float z = fma(load(in[i]) - middle[c], scale[c], move[c]), bounded = at_least(z);
                store(out + i, silu ? bounded * sigmoid(bounded) : z);
            });
        }
}

template <class T, bool last, bool silu>
void backward(const T *dy, const T *x, const float *gain, const float *shift, const float *mean, const float *rstd,
              T *dx, float *dgain, float *dshift, long N, long C, long P, long G, long rows, int threads) {
    const long D = C / G;
    const Cut cut(N, G, threads);
#pragma omp parallel for collapse(2) schedule(static) num_threads(threads)
    for (long n = 0; n < N; n++)
        for (long block = 0; block < cut.blocks; block++) {
            const long g0 = block * cut.groups, g1 = g0 + cut.groups < G ? g0 + cut.groups : G, c0 = g0 * D;
            const Block b{P, C, (g1 - g0) * D};
            const long first = n * C * P + (last ? c0 : c0 * P);
            const T *in = x + first, *coming = dy + first;
            T *out = dx + first;
            const Scratch scratch(b.width, 7);
            float *middle = scratch.narrow, *inverse = middle + b.width, *steep = inverse + b.width,
                  *level = steep + b.width, *slope = level + b.width, *part = slope + b.width;
            double *A = scratch.wide, *B = A + b.width;
            const float *times = gain + (rows > 1 ? n * C : 0) + c0, *move = shift + (rows > 1 ? n * C : 0) + c0;
            for (long c = 0; c < b.width; c++) {
                middle[c] = mean[n * G + g0 + c / D];
                inverse[c] = rstd[n * G + g0 + c / D];
                steep[c] = inverse[c] * times[c];
            }
            // dz costs an exponential, so it is stored between the two passes: where dx will be if that is float
            float *stored = keeper(out, last ? b.P * b.stride : b.P * b.width);
            // d of the loss by z = xhat * gain + shift
            const auto dz = [=](long i, long c, float xhat) {
                const float d = load(coming[i]);
                if (!silu) return d;
                const float z = at_least(fma(xhat, times[c], move[c])), s = sigmoid(z);
                return d * s * fma(z, 1.0f - s, 1.0f);
            };
            sums<last>(b, part, A, B, [=](long i, long c, float &u, float &v) {
                const float xhat = (load(in[i]) - middle[c]) * inverse[c];
                v = dz(i, c, xhat);
                u = v * xhat;
                if (stored) stored[i] = v;
            });
            // dx = rstd (gain dz - mean(gain dz) - xhat mean(gain dz xhat)), means over the group
            for (long g = g0; g < g1; g++) {
                const long from = (g - g0) * D;
                double m = 0, k = 0;
                for (long c = from; c < from + D; c++) {
                    dgain[n * C + c0 + c] = float(A[c]);
                    dshift[n * C + c0 + c] = float(B[c]);
                    k += times[c] * A[c];
                    m += times[c] * B[c];
                }
                const double count = double(D) * P;
                for (long c = from; c < from + D; c++) {
                    level[c] = float(inverse[c] * m / count);
                    slope[c] = float(inverse[c] * k / count);
                }
            }
            const auto finish = [=](long i, long c, float xhat, float d) {
                store(out + i, fma(d, steep[c], -fma(xhat, slope[c], level[c])));
            };
            const auto normal = [=](long i, long c) { return (load(in[i]) - middle[c]) * inverse[c]; };
            if (stored)
                each<last>(b, [=](long i, long c) { finish(i, c, normal(i, c), stored[i]); });
            else
                each<last>(b, [=](long i, long c) {
                    const float xhat = normal(i, c);
                    finish(i, c, xhat, dz(i, c, xhat));
                });
        }
}

}  // namespace

// NUMBER (float or bf16) and LAST (true or false) are defined where this is compiled: a run needs one of the four.
// x, y: N * C * P numbers. gain, shift: rows (1 or N) times C. mean, rstd: N * G.
extern "C" void adagn_silu_forward(int silu, const void *x, void *y, const float *gain, const float *shift, float *mean,
                                   float *rstd, long N, long C, long P, long G, long rows, double eps, int threads) {
    (silu ? forward<NUMBER, LAST, true> : forward<NUMBER, LAST, false>)(
        (const NUMBER *)x, (NUMBER *)y, gain, shift, mean, rstd, N, C, P, G, rows, eps, threads);
}

// Whether it was built with OpenMP.
extern "C" int adagn_silu_has_threads() {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

// dgain, dshift: N times C, one row per image even where gain and shift have one.
extern "C" void adagn_silu_backward(int silu, const void *dy, const void *x, const float *gain, const float *shift,
                                    const float *mean, const float *rstd, void *dx, float *dgain, float *dshift, long N,
                                    long C, long P, long G, long rows, int threads) {
    (silu ? backward<NUMBER, LAST, true> : backward<NUMBER, LAST, false>)(
        (const NUMBER *)dy, (const NUMBER *)x, gain, shift, mean, rstd, (NUMBER *)dx, dgain, dshift, N, C, P, G, rows,
        threads);
}
