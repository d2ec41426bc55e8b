// The small operations, attention and logits of kernels/ops.py, fused: one pass over memory each. Plain C interface,
// no torch headers, built in a second or two by kernels/native.py; fp32 inside, rounded once at the end.
//
//   attend        one partial softmax a page, merged while walking a row's pages in place (only keys that exist)
//   attend_chunk  the same for neighbouring rows of one sequence: keys are brought into lanes once for all of a tile's rows
//   add_rms_norm  r += x;  y = r / sqrt(mean(r^2) + eps) * w      (x null: no addition)
//   rope_store    (a, b) -> (a cos - b sin, b cos + a sin) for q and k, normed before if asked for;  k, v -> their slots
//   silu_mul      y = gate / (1 + exp(-gate)) * up
//   gelu_mul      y = gate / (1 + exp(-2 u)) * up,  u = sqrt(2 / pi) (gate + 0.044715 gate^3): gelu's tanh form
//   soft_cap      y = cap * tanh(y / cap)
//   few_rows      y = x W^T + b for a few rows of x: W is read once, from its begin to its end, as memory likes it
//   wide_product  y = x W^T in fp32, x and W in bf16; W is read once
//   page_sums     sum over a page's rows of mix64(sum of the row's words + key of its lane + key of its token)
//   page_weights  sum over a page's first slots of word * weight of its place

#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

struct bf16 {
  uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline void put(float* to, float x) { *to = x; }
inline void put(bf16* to, float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to->bits = (bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t(rounded);
}

// exp to about 2 units in the last place; below -87 it is that of -87, NaN stays NaN.
inline float fast_exp(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  float n = __builtin_rintf(x * 1.44269504f);
  float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  int32_t bits = (int32_t(n) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return p * scale;
}

// tanh to a few units in the last place, near 0 too.
inline float fast_tanh(float x) {
  const float z = x * x;
  float near = -5.70498872745e-3f;
  near = near * z + 2.06390887954e-2f;
  near = near * z - 5.37397155531e-2f;
  near = near * z + 1.33314422036e-1f;
  near = near * z - 3.33332819422e-1f;
  const float far = 1.0f - 2.0f / (fast_exp(2.0f * x) + 1.0f);
  return z < 0.390625f ? near * z * x + x : far;
}

// A vector register: wider vectors than the CPU has go through memory.
#ifdef __AVX512F__
constexpr int64_t kLanes = 16;
#define TURNED(x, by)                                                                                          \
  __builtin_shufflevector(x, x, (0 + by) % 16, (1 + by) % 16, (2 + by) % 16, (3 + by) % 16, (4 + by) % 16,    \
                          (5 + by) % 16, (6 + by) % 16, (7 + by) % 16, (8 + by) % 16, (9 + by) % 16,          \
                          (10 + by) % 16, (11 + by) % 16, (12 + by) % 16, (13 + by) % 16, (14 + by) % 16,     \
                          (15 + by) % 16)
#else
constexpr int64_t kLanes = 8;
#define TURNED(x, by)                                                                                          \
  __builtin_shufflevector(x, x, (0 + by) % 8, (1 + by) % 8, (2 + by) % 8, (3 + by) % 8, (4 + by) % 8,         \
                          (5 + by) % 8, (6 + by) % 8, (7 + by) % 8)
#endif
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));

// Sums are kept in lanes and added up in one fixed tree: the order of additions is in the source, the compiler may
// not change it, and so a row's bits do not depend on where the row lies or on who computes it.
inline float sum_of(Lanes x) {
#ifdef __AVX512F__
  x += TURNED(x, 8);
#endif
  x += TURNED(x, 4);
  x += TURNED(x, 2);
  x += TURNED(x, 1);
  return x[0];
}
inline Lanes larger(Lanes x, Lanes y) { return x > y ? x : y; }
inline float most_of(Lanes x) {
#ifdef __AVX512F__
  x = larger(x, TURNED(x, 8));
#endif
  x = larger(x, TURNED(x, 4));
  x = larger(x, TURNED(x, 2));
  return larger(x, TURNED(x, 1))[0];
}

typedef int32_t Ints __attribute__((vector_size(kLanes * sizeof(int32_t))));

// `fast_exp` of numbers not above 0.
inline Lanes fast_exp(Lanes x) {
  x = x < -87.0f ? Lanes{} - 87.0f : x;
  const Lanes turned = x * 1.44269504f + 12582912.0f, n = turned - 12582912.0f;
  const Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * Lanes((Ints(turned) + 127) << 23);
}

constexpr int64_t kKeys = 64;      // keys scored at a time, counted from absolute position 0
constexpr int64_t kMaxGroup = 16;  // checked by the caller
constexpr int64_t kMaxDim = 256;

// Keys or values [start + unseen, start + count) of one head, out of their pages: `each` gets t and where it lies.
template <class T, class Each>
inline void each_held(const T* half, const int64_t* pages, int64_t page_stride, int64_t page_tokens, int64_t start,
                      int64_t unseen, int64_t count, int64_t dim, Each each) {
  for (int64_t t = unseen; t < count;) {
    const int64_t slot = (start + t) % page_tokens;
    const int64_t end = page_tokens - slot < count - t ? t + page_tokens - slot : count;
    const T* from = half + pages[(start + t) / page_tokens] * page_stride + slot * dim;
    for (; t < end; t++, from += dim) each(t, from);
  }
}

// The same in fp32.
template <class T, int64_t kRoom>
void hold(const T* half, const int64_t* pages, int64_t page_stride, int64_t page_tokens, int64_t start, int64_t unseen,
          int64_t count, int64_t dim, float (*held)[kRoom]) {
  each_held(half, pages, page_stride, page_tokens, start, unseen, count, dim, [&](int64_t t, const T* from) {
    for (int64_t d = 0; d < dim; d++) held[t][d] = wide(from[d]);
  });
}

// One KV head of one row: `group` queries against `keys` keys. A head size known to the compiler (kDim, else 0)
// keeps a query's sums in registers.
template <class T, int64_t kDim>
void attend_head(const T* q, const T* layer, const int64_t* pages, int64_t keys, int64_t page_stride,
                 int64_t page_tokens, int64_t kv_heads, int64_t head, int64_t group, int64_t any_dim, float scale,
                 int64_t window, float cap, T* out) {
  constexpr int64_t kRoom = kDim ? kDim : kMaxDim;
  const int64_t dim = kDim ? kDim : any_dim;
  const int64_t parts = kDim ? kDim / kLanes : (any_dim + kLanes - 1) / kLanes;
  alignas(64) float query[kMaxGroup][kRoom], mixed[kMaxGroup][kRoom], held[kKeys][kRoom], share[kMaxGroup][kKeys];
  float top[kMaxGroup], total[kMaxGroup];
  if (!kDim) std::memset(held, 0, sizeof held);  // behind an odd head's end
  for (int64_t g = 0; g < group; g++) {
    for (int64_t d = 0; d < parts * kLanes; d++) {
      query[g][d] = d < dim ? wide(q[g * dim + d]) * scale : 0;
      mixed[g][d] = 0;
    }
    top[g] = -1e30f;
    total[g] = 0;
  }
  const int64_t lowest = window && keys > window ? keys - window : 0;  // the first key that is seen
  for (int64_t start = lowest / kKeys * kKeys; start < keys; start += kKeys) {
    const int64_t unseen = lowest > start ? lowest - start : 0;
    const int64_t count = keys - start < kKeys ? keys - start : kKeys;
    hold(layer + head * page_tokens * dim, pages, page_stride, page_tokens, start, unseen, count, dim, held);
    for (int64_t g = 0; g < group; g++) {
      float* score = share[g];
      const Lanes* left = reinterpret_cast<const Lanes*>(query[g]);
      for (int64_t t = unseen; t < count; t++) {
        const Lanes* right = reinterpret_cast<const Lanes*>(held[t]);
        Lanes sum = {};
        for (int64_t part = 0; part < parts; part++) sum += left[part] * right[part];
        score[t] = sum_of(sum);
      }
      if (cap > 0)
        for (int64_t t = 0; t < kKeys; t++) score[t] = cap * fast_tanh(score[t] / cap);
      for (int64_t t = 0; t < unseen; t++) score[t] = -1e30f;
      for (int64_t t = count; t < kKeys; t++) score[t] = -1e30f;
      Lanes most = *reinterpret_cast<const Lanes*>(score);
      for (int64_t t = kLanes; t < kKeys; t += kLanes) most = larger(*reinterpret_cast<const Lanes*>(score + t), most);
      const float highest = most_of(most), best = highest > top[g] ? highest : top[g];
      const float shrink = fast_exp(top[g] - best);
      for (int64_t t = 0; t < kKeys; t++) score[t] = fast_exp(score[t] - best);
      for (int64_t t = 0; t < unseen; t++) score[t] = 0;
      for (int64_t t = count; t < kKeys; t++) score[t] = 0;
      Lanes sum = {};
      for (int64_t t = 0; t < kKeys; t += kLanes) sum += *reinterpret_cast<const Lanes*>(score + t);
      for (int64_t d = 0; d < parts * kLanes; d++) mixed[g][d] *= shrink;
      total[g] = total[g] * shrink + sum_of(sum);
      top[g] = best;
    }
    hold(layer + (kv_heads + head) * page_tokens * dim, pages, page_stride, page_tokens, start, unseen, count, dim,
         held);
    for (int64_t g = 0; g < group; g++) {
      alignas(64) float sum[kRoom];
      std::memcpy(sum, mixed[g], sizeof(float) * parts * kLanes);
      for (int64_t t = unseen; t < count; t++)
        for (int64_t d = 0; d < parts * kLanes; d++) sum[d] += share[g][t] * held[t][d];
      std::memcpy(mixed[g], sum, sizeof(float) * parts * kLanes);
    }
  }
  for (int64_t g = 0; g < group; g++)
    for (int64_t d = 0; d < dim; d++) put(out + g * dim + d, mixed[g][d] / total[g]);
}

template <class T>
void attend(const T* q, int64_t q_stride, const T* layer, const int64_t* pages, const int64_t* first,
            const int64_t* keys, const int64_t* rows, int64_t count, int64_t page_stride, int64_t page_tokens,
            int64_t kv_heads, int64_t group, int64_t dim, float scale, int64_t window, float cap, T* out,
            int threads) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < count * kv_heads; task++) {
    const int64_t n = task / kv_heads, head = task % kv_heads, at = head * group * dim;
    const auto run = dim == 64 ? attend_head<T, 64> : dim == 128 ? attend_head<T, 128> : attend_head<T, 0>;
    run(q + rows[n] * q_stride + at, layer, pages + first[n], keys[n], page_stride, page_tokens, kv_heads, head, group,
        dim, scale, window, cap, out + rows[n] * kv_heads * group * dim + at);
  }
}

// One row's sum of squares, in lanes.
template <class T>
float squares(const T* x, int64_t cols) {
  Lanes sum = {};
  for (int64_t c = 0; c < cols; c += kLanes) {
    Lanes part = {};
    for (int64_t i = 0; i < (cols - c < kLanes ? cols - c : kLanes); i++) part[i] = wide(x[c + i]);
    sum += part * part;
  }
  return sum_of(sum);
}

template <class T>
void add_rms_norm(const T* x, T* residual, const float* weight, T* out, int64_t rows, int64_t cols, float eps,
                  int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows >= 32)
  for (int64_t n = 0; n < rows; n++) {
    T* r = residual + n * cols;
    if (x)
      for (int64_t c = 0; c < cols; c++) put(r + c, wide(r[c]) + wide(x[n * cols + c]));
    const float scale = 1.0f / __builtin_sqrtf(squares(r, cols) / float(cols) + eps);
    for (int64_t c = 0; c < cols; c++) put(out + n * cols + c, wide(r[c]) * scale * weight[c]);
  }
}

template <class T>
void rope_store(T* qkv, const float* cosine, const float* sine, const float* q_norm, const float* k_norm, float eps,
                const int64_t* page, const int64_t* slot, T* layer, int64_t rows, int64_t page_stride,
                int64_t page_tokens, int64_t heads, int64_t kv_heads, int64_t dim, int threads) {
  const int64_t half = dim / 2, all = heads + 2 * kv_heads;
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows >= 32)
  for (int64_t n = 0; n < rows; n++) {
    T* row = qkv + n * all * dim;
    const float *c = cosine + n * half, *s = sine + n * half;
    for (int64_t h = 0; h < heads + kv_heads; h++) {
      T *a = row + h * dim, *b = a + half;
      if (q_norm) {
        const float* weight = h < heads ? q_norm : k_norm;
        const float scale = 1.0f / __builtin_sqrtf(squares(a, dim) / float(dim) + eps);
        for (int64_t d = 0; d < dim; d++) put(a + d, wide(a[d]) * scale * weight[d]);
      }
      for (int64_t d = 0; d < half; d++) {
        const float x = wide(a[d]), y = wide(b[d]);
        put(a + d, x * c[d] - y * s[d]);
        put(b + d, y * c[d] + x * s[d]);
      }
    }
    T* held = layer + page[n] * page_stride + slot[n] * dim;
    for (int64_t h = 0; h < 2 * kv_heads; h++)
      std::memcpy(held + h * page_tokens * dim, row + (heads + h) * dim, dim * sizeof(T));
  }
}

template <bool kGelu, class T>
void gated(const T* gate_up, T* out, int64_t rows, int64_t cols, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows >= 32)
  for (int64_t n = 0; n < rows; n++) {
    const T *gate = gate_up + 2 * n * cols, *up = gate + cols;
    for (int64_t c = 0; c < cols; c++) {
      const float x = wide(gate[c]);
      const float inner = kGelu ? 1.5957691216f * (x + 0.044715f * x * x * x) : x;
      put(out + n * cols + c, x / (1.0f + fast_exp(-inner)) * wide(up[c]));
    }
  }
}
template <class T>
void silu_mul(const T* gate_up, T* out, int64_t rows, int64_t cols, int threads) {
  gated<false>(gate_up, out, rows, cols, threads);
}
template <class T>
void gelu_mul(const T* gate_up, T* out, int64_t rows, int64_t cols, int threads) {
  gated<true>(gate_up, out, rows, cols, threads);
}

template <class T>
void soft_cap(T* logits, int64_t rows, int64_t cols, float cap, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1 && rows >= 32)
  for (int64_t n = 0; n < rows; n++)
    for (int64_t c = 0; c < cols; c++) put(logits + n * cols + c, cap * fast_tanh(wide(logits[n * cols + c]) / cap));
}

// As many of a row as are multiplied at a time, and the sums with these products added to them.
template <class T>
constexpr int64_t kStep = kLanes * 4 / sizeof(T);

inline Lanes some(const float* from) {
  Lanes found;
  std::memcpy(&found, from, sizeof found);
  return found;
}
// Said by name: left to itself the compiler rounds a product before it is added where few sums are built side by side.
inline Lanes added(Lanes sums, Lanes x, Lanes y) {
#if defined(__AVX512F__)
  return Lanes(_mm512_fmadd_ps(__m512(x), __m512(y), __m512(sums)));
#elif defined(__FMA__)
  return Lanes(_mm256_fmadd_ps(__m256(x), __m256(y), __m256(sums)));
#else
  return sums + x * y;
#endif
}

#ifdef __AVX512BF16__
typedef __m512bh Pairs;

inline Pairs some(const bf16* from) {
  Pairs found;
  std::memcpy(&found, from, sizeof found);
  return found;
}
inline Lanes added(Lanes sums, Pairs x, Pairs y) { return Lanes(_mm512_dpbf16_ps(__m512(sums), x, y)); }
#endif

// As many numbers of a row as one of its words has: what a product adds up in each lane at a time.
template <class T>
constexpr int64_t kWord = 4 / sizeof(T);

// One word in all lanes; lanes as numbers of a row.
inline Lanes all_lanes(const float* word) { return Lanes{} + *word; }
inline void put_lanes(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }
#ifdef __AVX512BF16__
inline Pairs all_lanes(const bf16* word) {
  int32_t bits;
  std::memcpy(&bits, word, 4);
  return Pairs(_mm512_set1_epi32(bits));
}
inline void put_lanes(bf16* to, Lanes x) {
  const __m256bh rounded = _mm512_cvtneps_pbh(__m512(x));
  std::memcpy(to, &rounded, sizeof rounded);
}
#endif

#ifdef __AVX512F__
constexpr int64_t kSumRows = 4, kSumLanes = 4;  // sums in registers at a time: rows, and vectors of each
#else
constexpr int64_t kSumRows = 2, kSumLanes = 4;
#endif

// out[r][lane] += sum over words of left[r][word] * right[word][lane]; a row of `right` has `stride` lanes.
template <int64_t kRows, int64_t kVectors, class T>
void add_lanes(const T* const* left, int64_t words, const T* right, int64_t stride, float* const* out, int64_t lane) {
  Lanes sums[kRows][kVectors];
  for (int64_t r = 0; r < kRows; r++)
    for (int64_t v = 0; v < kVectors; v++) sums[r][v] = some(out[r] + lane + v * kLanes);
  for (int64_t w = 0; w < words; w++) {
    const T* from = right + (w * stride + lane) * kWord<T>;
    for (int64_t r = 0; r < kRows; r++) {
      const auto word = all_lanes(left[r] + w * kWord<T>);
      for (int64_t v = 0; v < kVectors; v++) sums[r][v] = added(sums[r][v], word, some(from + v * kLanes * kWord<T>));
    }
  }
  for (int64_t r = 0; r < kRows; r++)
    for (int64_t v = 0; v < kVectors; v++) put_lanes(out[r] + lane + v * kLanes, sums[r][v]);
}

template <int64_t kRows, class T>
void add_products(const T* const* left, int64_t words, const T* right, int64_t stride, float* const* out) {
  int64_t lane = 0;
  for (; lane + kSumLanes * kLanes <= stride; lane += kSumLanes * kLanes)
    add_lanes<kRows, kSumLanes>(left, words, right, stride, out, lane);
  for (; lane < stride; lane += kLanes) add_lanes<kRows, 1>(left, words, right, stride, out, lane);
}

constexpr int64_t kTileRows = 128;  // queries of all heads of a group that share the work of bringing keys into lanes

// Up to kKeys keys and values of one head, as products want them, and what a tile's rows have made of those before.
template <class T>
struct Tile {
  alignas(64) T keys[kMaxDim * kKeys];    // [word of a head][key][number of a word]
  alignas(64) T values[kMaxDim * kKeys];  // [word of keys][number of a head][key of a word]
  alignas(64) float mixed[kTileRows][kMaxDim];
  float top[kTileRows], total[kTileRows];
};

// `kRows` rows of a tile against its keys; row r sees those from from[r] on, below to[r].
template <int64_t kRows, class T>
void attend_rows(Tile<T>& tile, int64_t row, const T* const* q, int64_t dim, int64_t lanes, const int64_t* from,
                 const int64_t* to, float scale, float cap) {
  alignas(64) float score[kRows][kKeys] = {};
  alignas(64) T share[kRows][kKeys];
  float *scores[kRows], *mixed[kRows];
  const T* shares[kRows];
  for (int64_t r = 0; r < kRows; r++) {
    scores[r] = score[r];
    mixed[r] = tile.mixed[row + r];
    shares[r] = share[r];
  }
  add_products<kRows>(q, dim / kWord<T>, tile.keys, kKeys, scores);
  int64_t most_keys = 0;
  for (int64_t r = 0; r < kRows; r++) {
    float* x = score[r];
    Lanes most = Lanes{} - 1e30f, sum = {};
    if (cap > 0)
      for (int64_t t = 0; t < kKeys; t++) x[t] = cap * fast_tanh(x[t] * scale / cap) / scale;
    for (int64_t t = 0; t < from[r]; t++) x[t] = -1e30f;
    for (int64_t t = to[r]; t < kKeys; t++) x[t] = -1e30f;
    for (int64_t t = 0; t < kKeys; t += kLanes) most = larger(some(x + t), most);
    const float highest = most_of(most), before = tile.top[row + r], best = highest > before ? highest : before;
    for (int64_t t = 0; t < kKeys; t += kLanes) {
      const Lanes one = fast_exp((some(x + t) - best) * scale);
      sum += one;
      put_lanes(share[r] + t, one);
    }
    if (best > before) {
      const float shrink = fast_exp((before - best) * scale);
      for (int64_t d = 0; d < lanes; d++) mixed[r][d] *= shrink;
      tile.total[row + r] *= shrink;
      tile.top[row + r] = best;
    }
    tile.total[row + r] += sum_of(sum);
    most_keys = to[r] > most_keys ? to[r] : most_keys;
  }
  add_products<kRows>(shares, (most_keys + kWord<T> - 1) / kWord<T>, tile.values, lanes, mixed);
}

// One KV head of the queries [first, first + count) of a sequence, whose positions begin at `start`.
template <class T>
void attend_tile(const T* q, int64_t q_stride, const T* layer, const int64_t* pages, int64_t start, int64_t count,
                 int64_t page_stride, int64_t page_tokens, int64_t kv_heads, int64_t head, int64_t group, int64_t dim,
                 float scale, int64_t window, float cap, T* out, int64_t out_stride) {
  Tile<T> tile;
  const int64_t lanes = (dim + kLanes - 1) / kLanes * kLanes, rows = count * group, stop = start + count;
  for (int64_t r = 0; r < rows; r++) {
    std::memset(tile.mixed[r], 0, lanes * sizeof(float));
    tile.top[r] = -1e30f;
    tile.total[r] = 0;
  }
  const auto place = [&](int64_t row) { return row / group * q_stride + (head * group + row % group) * dim; };
  const int64_t lowest = window && start >= window ? start - window + 1 : 0;
  for (int64_t base = lowest / kKeys * kKeys; base < stop; base += kKeys) {
    const int64_t unseen = lowest > base ? lowest - base : 0, held = stop - base < kKeys ? stop - base : kKeys;
    // What nobody sees counts nothing, and must be a number for that.
    std::memset(tile.keys, 0, dim * kKeys * sizeof(T));
    std::memset(tile.values, 0, lanes * kKeys * sizeof(T));
    each_held(layer + head * page_tokens * dim, pages, page_stride, page_tokens, base, unseen, held, dim,
              [&](int64_t t, const T* key) {
                for (int64_t w = 0; w < dim / kWord<T>; w++)
                  std::memcpy(tile.keys + (w * kKeys + t) * kWord<T>, key + w * kWord<T>, 4);
              });
    each_held(layer + (kv_heads + head) * page_tokens * dim, pages, page_stride, page_tokens, base, unseen, held, dim,
              [&](int64_t t, const T* value) {
                T* to = tile.values + t / kWord<T> * lanes * kWord<T> + t % kWord<T>;
                for (int64_t d = 0; d < dim; d++) to[d * kWord<T>] = value[d];
              });
    for (int64_t row = 0; row < rows;) {
      const int64_t some_rows = row + kSumRows <= rows ? kSumRows : 1;
      const T* queries[kSumRows];
      int64_t from[kSumRows], to[kSumRows], seen_keys = 0;
      for (int64_t r = 0; r < some_rows; r++) {
        const int64_t last = start + (row + r) / group + 1 - base, first = window ? last - window : 0;
        queries[r] = q + place(row + r);
        to[r] = last < 0 ? 0 : last < held ? last : held;
        from[r] = first < 0 ? 0 : first < to[r] ? first : to[r];
        seen_keys += to[r] - from[r];
      }
      const auto rows_of = some_rows == 1 ? attend_rows<1, T> : attend_rows<kSumRows, T>;
      if (seen_keys) rows_of(tile, row, queries, dim, lanes, from, to, scale, cap);
      row += some_rows;
    }
  }
  for (int64_t r = 0; r < rows; r++) {
    T* to = out + r / group * out_stride + (head * group + r % group) * dim;
    for (int64_t d = 0; d < dim; d++) put(to + d, tile.mixed[r][d] / tile.total[r]);
  }
}

template <class T>
void attend_chunk(const T* q, int64_t q_stride, const T* layer, const int64_t* pages, int64_t start, int64_t count,
                  int64_t page_stride, int64_t page_tokens, int64_t kv_heads, int64_t group, int64_t dim, float scale,
                  int64_t window, float cap, T* out, int threads) {
  const int64_t each = kTileRows / group, tiles = (count + each - 1) / each, out_stride = kv_heads * group * dim;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
  for (int64_t task = 0; task < tiles * kv_heads; task++) {
    const int64_t first = task / kv_heads * each, head = task % kv_heads;
    attend_tile(q + first * q_stride, q_stride, layer, pages, start + first, each < count - first ? each : count - first,
                page_stride, page_tokens, kv_heads, head, group, dim, scale, window, cap, out + first * out_stride,
                out_stride);
  }
}

// Rows with zeros behind their end, `stride` apart: a multiple of a step.
template <class T>
struct Held {
  const int64_t stride;
  std::vector<T> rows;

  Held(const T* x, int64_t count, int64_t cols)
      : stride((cols + kStep<T> - 1) / kStep<T> * kStep<T>), rows(count * stride) {
    for (int64_t r = 0; r < count; r++) std::memcpy(&rows[r * stride], x + r * cols, cols * sizeof(T));
  }
};

template <int64_t kRows, class T, class Out>
void few_rows_of(const Held<T>& x, const T* w, const T* bias, Out* out, int64_t outs, int64_t cols, int threads) {
  const int64_t whole = cols / kStep<T> * kStep<T>;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t o = 0; o < outs; o++) {
    const T* row = w + o * cols;
    Lanes sums[kRows] = {};
    const auto add = [&](const T* from, int64_t c) {
      const auto right = some(from);
      for (int64_t r = 0; r < kRows; r++) sums[r] = added(sums[r], some(&x.rows[r * x.stride + c]), right);
    };
    for (int64_t c = 0; c < whole; c += kStep<T>) add(row + c, c);
    if (whole < cols) {
      T rest[kStep<T>] = {};
      std::memcpy(rest, row + whole, (cols - whole) * sizeof(T));
      add(rest, whole);
    }
    for (int64_t r = 0; r < kRows; r++) put(out + r * outs + o, sum_of(sums[r]) + (bias ? wide(bias[o]) : 0.0f));
  }
}

constexpr int64_t kFew = 3;  // of more rows the sums are too many for this to be as quick as memory

template <class T, class Out>
void few_rows(const T* x, const T* w, const T* bias, Out* out, int64_t rows, int64_t outs, int64_t cols, int threads) {
  const Held<T> held(x, rows, cols);
  const auto product = rows == 1 ? few_rows_of<1, T, Out> : rows == 2 ? few_rows_of<2, T, Out> : few_rows_of<3, T, Out>;
  product(held, w, bias, out, outs, cols, threads);
}

#ifdef __AVX512BF16__
constexpr int64_t kBlock = 4;   // rows, and outputs, whose sums are in registers at a time
constexpr int64_t kTile = 16;   // outputs that a thread takes at a time

// Rows of x are `stride` apart, with zeros behind their end. A row's sums do not depend on the other rows.
template <int64_t kRows, int64_t kOuts>
void product_block(const bf16* x, int64_t stride, const bf16* w, int64_t cols, float* out, int64_t outs) {
  Lanes sums[kRows][kOuts] = {};
  Pairs right[kOuts];
  const auto add = [&](int64_t c) {
    for (int64_t r = 0; r < kRows; r++) {
      const Pairs left = some(x + r * stride + c);
      for (int64_t o = 0; o < kOuts; o++) sums[r][o] = added(sums[r][o], left, right[o]);
    }
  };
  const int64_t whole = cols / kStep<bf16> * kStep<bf16>;
  for (int64_t c = 0; c < whole; c += kStep<bf16>) {
    for (int64_t o = 0; o < kOuts; o++) {
      right[o] = some(w + o * cols + c);
      __builtin_prefetch(w + (o + kOuts) * cols + c);
    }
    add(c);
  }
  if (whole < cols) {
    for (int64_t o = 0; o < kOuts; o++) {
      bf16 rest[kStep<bf16>] = {};
      std::memcpy(rest, w + o * cols + whole, (cols - whole) * sizeof(bf16));
      right[o] = some(rest);
    }
    add(whole);
  }
  for (int64_t r = 0; r < kRows; r++)
    for (int64_t o = 0; o < kOuts; o++) out[r * outs + o] = sum_of(sums[r][o]);
}

template <int64_t kOuts>
void product_rows(const bf16* x, int64_t rows, int64_t stride, const bf16* w, int64_t cols, float* out, int64_t outs) {
  for (; rows >= kBlock; rows -= kBlock, x += kBlock * stride, out += kBlock * outs)
    product_block<kBlock, kOuts>(x, stride, w, cols, out, outs);
  if (rows == 3) product_block<3, kOuts>(x, stride, w, cols, out, outs);
  if (rows == 2) product_block<2, kOuts>(x, stride, w, cols, out, outs);
  if (rows == 1) product_block<1, kOuts>(x, stride, w, cols, out, outs);
}
#endif

// The finaliser of splitmix64.
inline uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

typedef uint64_t Four __attribute__((vector_size(32)));

template <int64_t kWords>
inline uint64_t row_sum(const uint64_t* row, int64_t words) {
  if (kWords) words = kWords;
  Four four = {};
  int64_t word = 0;
  for (; word + 4 <= words; word += 4) {
    Four next;
    std::memcpy(&next, row + word, sizeof next);
    four += next;
  }
  uint64_t sum = four[0] + four[1] + four[2] + four[3];
  for (; word < words; word++) sum += row[word];
  return sum;
}

// Sums of several rows first, then their mixing: each is a loop of its own that the compiler turns into vectors.
template <int64_t kWords>
void page_sums_of(const uint64_t* pages, int64_t count, int64_t lanes, int64_t page_tokens, int64_t words,
                  int64_t tokens, const uint64_t* lane_keys, const uint64_t* keys, uint64_t* out) {
  constexpr int64_t kRows = 16;
  for (int64_t page = 0; page < count; page++, keys += page_tokens) {
    uint64_t total = 0;
    for (int64_t lane = 0; lane < lanes; lane++) {
      const uint64_t* row = pages + (page * lanes + lane) * page_tokens * words;
      for (int64_t first = 0; first < tokens; first += kRows) {
        const int64_t rows = tokens - first < kRows ? tokens - first : kRows;
        uint64_t sums[kRows];
        for (int64_t n = 0; n < rows; n++, row += words) sums[n] = row_sum<kWords>(row, words);
        for (int64_t n = 0; n < rows; n++) total += mix64(sums[n] + lane_keys[lane] + keys[first + n]);
      }
    }
    out[page] = total;
  }
}

}  // namespace

// q: [count, heads, dim], rows `q_stride` apart, the positions from `start` on of the sequence with these pages.
#define ATTEND_CHUNK(T)                                                                                              \
  (const T* q, int64_t q_stride, const T* layer, const int64_t* pages, int64_t start, int64_t count,                \
   int64_t page_stride, int64_t page_tokens, int64_t kv_heads, int64_t group, int64_t dim, float scale, int64_t window, \
   float cap, T* out, int threads) {                                                                                \
    attend_chunk(q, q_stride, layer, pages, start, count, page_stride, page_tokens, kv_heads, group, dim, scale,     \
                 window, cap, out, threads);                                                                        \
  }
extern "C" void attend_chunk_float32 ATTEND_CHUNK(float)
#ifdef __AVX512BF16__
extern "C" void attend_chunk_bfloat16 ATTEND_CHUNK(bf16)
#endif

// x: [rows, cols], at most kFew rows; w: [outs, cols], bias: [outs] or null, out: [rows, outs].
extern "C" void few_rows_float32(const float* x, const float* w, const float* bias, float* out, int64_t rows,
                                 int64_t outs, int64_t cols, int threads) {
  few_rows(x, w, bias, out, rows, outs, cols, threads);
}

#ifdef __AVX512BF16__
extern "C" void few_rows_bfloat16(const bf16* x, const bf16* w, const bf16* bias, bf16* out, int64_t rows, int64_t outs,
                                  int64_t cols, int threads) {
  few_rows(x, w, bias, out, rows, outs, cols, threads);
}

// x: [rows, cols], w: [outs, cols], out: [rows, outs].
extern "C" void wide_product(const bf16* x, const bf16* w, float* out, int64_t rows, int64_t outs, int64_t cols,
                             int threads) {
  if (rows <= kFew) return few_rows<bf16, float>(x, w, nullptr, out, rows, outs, cols, threads);
  const Held<bf16> held(x, rows, cols);
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t tile = 0; tile < outs; tile += kTile) {
    const int64_t end = tile + kTile < outs ? tile + kTile : outs;
    for (int64_t o = tile; o < end; o += o + kBlock <= end ? kBlock : 1) {
      auto product = o + kBlock <= end ? product_rows<kBlock> : product_rows<1>;
      product(held.rows.data(), rows, held.stride, w + o * cols, cols, out + o, outs);
    }
  }
}
#endif

// pages: [count, lanes, page_tokens, words], of whose tokens the first `tokens` are summed; `keys`: of count * page_tokens.
extern "C" void page_sums(const uint64_t* pages, int64_t count, int64_t lanes, int64_t page_tokens, int64_t words,
                          int64_t tokens, const uint64_t* lane_keys, const uint64_t* keys, uint64_t* out) {
  auto sums = words == 16 ? page_sums_of<16> : words == 32 ? page_sums_of<32> : page_sums_of<0>;  // heads of 64, 128
  sums(pages, count, lanes, page_tokens, words, tokens, lane_keys, keys, out);
}

// arena: [page, lanes, page_tokens, words], weights: of one page; of each of `count` pages the first `slots` tokens.
extern "C" void page_weights(const uint64_t* arena, int64_t lanes, int64_t page_tokens, int64_t words,
                             const uint64_t* weights, const int64_t* pages, const int64_t* slots, int64_t count,
                             uint64_t* out) {
  const int64_t lane_words = page_tokens * words, page_words = lanes * lane_words;
  for (int64_t n = 0; n < count; n++) {
    const uint64_t* page = arena + pages[n] * page_words;
    uint64_t total = 0;
    if (slots[n] == page_tokens) {
      for (int64_t at = 0; at < page_words; at++) total += page[at] * weights[at];
    } else {
      for (int64_t lane = 0; lane < page_words; lane += lane_words)
        for (int64_t at = lane; at < lane + slots[n] * words; at++) total += page[at] * weights[at];
    }
    out[n] = total;
  }
}

#define BOTH(name, parameters, arguments)                                  \
  extern "C" void name##_float32 parameters(float) { name<float> arguments; } \
  extern "C" void name##_bfloat16 parameters(bf16) { name<bf16> arguments; }

#define ATTEND(T)                                                                                                  \
  (const T* q, int64_t q_stride, const T* layer, const int64_t* pages, const int64_t* first, const int64_t* keys, \
   const int64_t* rows, int64_t count, int64_t page_stride, int64_t page_tokens, int64_t kv_heads, int64_t group, \
   int64_t dim, float scale, int64_t window, float cap, T* out, int threads)
BOTH(attend, ATTEND, (q, q_stride, layer, pages, first, keys, rows, count, page_stride, page_tokens, kv_heads, group,
                      dim, scale, window, cap, out, threads))

#define ADD_RMS_NORM(T) \
  (const T* x, T* residual, const float* weight, T* out, int64_t rows, int64_t cols, float eps, int threads)
BOTH(add_rms_norm, ADD_RMS_NORM, (x, residual, weight, out, rows, cols, eps, threads))

#define ROPE_STORE(T)                                                                                           \
  (T * qkv, const float* cosine, const float* sine, const float* q_norm, const float* k_norm, float eps,       \
   const int64_t* page, const int64_t* slot, T* layer, int64_t rows, int64_t page_stride, int64_t page_tokens, \
   int64_t heads, int64_t kv_heads, int64_t dim, int threads)
BOTH(rope_store, ROPE_STORE, (qkv, cosine, sine, q_norm, k_norm, eps, page, slot, layer, rows, page_stride,
                              page_tokens, heads, kv_heads, dim, threads))

#define SILU_MUL(T) (const T* gate_up, T* out, int64_t rows, int64_t cols, int threads)
BOTH(silu_mul, SILU_MUL, (gate_up, out, rows, cols, threads))
BOTH(gelu_mul, SILU_MUL, (gate_up, out, rows, cols, threads))

#define SOFT_CAP(T) (T * logits, int64_t rows, int64_t cols, float cap, int threads)
BOTH(soft_cap, SOFT_CAP, (logits, rows, cols, cap, threads))
