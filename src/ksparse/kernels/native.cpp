// The parts of a training step that plain torch cannot do in one pass over memory. A C interface, with
// no torch and no Python.
//
//   ks_select     pre-activations -> the k largest of each token, exactly
//   ks_lower      rows -> quantized rows
//   ks_rescore    low-precision products -> candidates, reranked: the k best by exact value, and a
//                 certificate
//   ks_screen     the same from quantized rows: the products of bytes are computed here and never
//                 leave the cache
//   ks_decode     values -> reconstruction error, loss and the values' gradient, reading the rows once
//   ks_transpose  tokens' latents -> latents' tokens
//   ks_update     latents' tokens -> both gradient rows of a latent, projection, Adam, unit norm,
//                 average, quantized copy
//   ks_reconstruct, ks_slopes
//                 the two halves of ks_decode, where shards of the latents sum their reconstructions
//                 in between
//
// Every loop is split over threads at fixed borders, so the same number of threads gives the same bits.
// The file is compiled for the processor that runs it; loops are written so that the compiler can
// vectorise them at any width.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

#if defined(__AVX2__) && !defined(KS_PORTABLE)
#include <immintrin.h>
#endif

namespace {

#ifdef __linux__
// Starts threads on other cores than the caller's. A new thread starts on its parent's core, and where
// other processes keep the scheduler from finding an idle one it waits there until the parent has done
// its share. Once started, it may move to any core that the process may use.
struct Cores {
    cpu_set_t allowed;
    std::vector<int> list;
    size_t own = 0;

    Cores() {
        CPU_ZERO(&allowed);
        if (sched_getaffinity(0, sizeof allowed, &allowed)) return;  // more cores than the set can name
        int here = sched_getcpu();
        for (int c = 0; c < CPU_SETSIZE; c++)
            if (CPU_ISSET(c, &allowed)) {
                if (c == here) own = list.size();
                list.push_back(c);
            }
    }
    void attribute(pthread_attr_t& attributes, size_t thread) const {
        if (list.size() < 2) return;
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(list[(own + thread) % list.size()], &one);
        pthread_attr_setaffinity_np(&attributes, sizeof one, &one);
    }
    void release() const {
        if (list.size() >= 2) pthread_setaffinity_np(pthread_self(), sizeof allowed, &allowed);
    }
};

template <class F>
void parallel(const std::vector<int64_t>& borders, F work) {  // work(thread, begin, end)
    struct Share {
        F* work;
        const Cores* cores;
        int thread;
        int64_t begin, end;
        pthread_t id;
        static void* run(void* given) {
            auto* mine = (Share*)given;
            mine->cores->release();
            (*mine->work)(mine->thread, mine->begin, mine->end);
            return nullptr;
        }
    };
    const size_t count = borders.size() - 1;
    if (count < 2) return work(0, borders[0], borders[1]);
    Cores cores;
    std::vector<Share> shares;
    for (size_t t = 1; t < count; t++) shares.push_back({&work, &cores, (int)t, borders[t], borders[t + 1], {}});
    std::vector<bool> begun;
    for (auto& share : shares) {
        pthread_attr_t attributes;
        pthread_attr_init(&attributes);
        cores.attribute(attributes, share.thread);
        begun.push_back(pthread_create(&share.id, &attributes, Share::run, &share) == 0);
        pthread_attr_destroy(&attributes);
    }
    work(0, borders[0], borders[1]);
    for (size_t i = 0; i < shares.size(); i++) {
        if (begun[i]) pthread_join(shares[i].id, nullptr);
        else work(shares[i].thread, shares[i].begin, shares[i].end);  // the system gave no thread
    }
}
#else
template <class F>
void parallel(const std::vector<int64_t>& borders, F work) {  // work(thread, begin, end)
    std::vector<std::thread> pool;
    for (size_t t = 1; t + 1 < borders.size(); t++) pool.emplace_back(work, (int)t, borders[t], borders[t + 1]);
    work(0, borders[0], borders[1]);
    for (auto& each : pool) each.join();
}
#endif

std::vector<int64_t> even(int64_t count, int threads) {
    std::vector<int64_t> borders;
    for (int t = 0; t <= threads; t++) borders.push_back(count * t / threads);
    return borders;
}

float dot(const float* a, const float* b, int64_t d) {
    float parts[32] = {}, sum = 0;  // enough that additions do not wait for each other
    int64_t i = 0;
    for (; i + 32 <= d; i += 32)
        for (int l = 0; l < 32; l++) parts[l] += a[i + l] * b[i + l];
    for (; i < d; i++) sum += a[i] * b[i];
    for (int l = 0; l < 32; l++) sum += parts[l];
    return sum;
}

void add_scaled(float* out, float by, const float* row, int64_t d) {
    for (int64_t i = 0; i < d; i++) out[i] += by * row[i];
}

// Prefetches the beginning of a row that is needed soon. The processor sees a row being read and fetches
// the rest of it by itself; asking for all of it costs a quarter more time (docs/lab-book.md).
void fetch(const float* row, int64_t d) {
    for (int64_t i = 0; i < std::min<int64_t>(d, 64); i += 16) __builtin_prefetch(row + i);
}

const float NOTHING = -std::numeric_limits<float>::infinity();
const int LANES = 64, EVERY = 8;

// A float's bits as an integer of the same order.
int32_t ordered(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Keeps the k largest of the values offered to it, in the order in which they were offered. Values that
// do not reach the k-th so far are dropped at once.
struct Best {
    int k, count = 0, room;
    float bar = NOTHING;  // only values above it can still be among the k largest
    std::vector<float> value;
    std::vector<int32_t> latent, key;

    explicit Best(int k, int times = 2) : k(k), room(times * k + LANES), value(room + LANES), latent(room + LANES), key(room + LANES) {}

    void clear(float from = NOTHING) {
        count = 0;
        bar = from;
    }
    void offer(float one, int32_t of) {
        value[count] = one;
        latent[count] = of;
        count += one > bar;  // without a branch
        if (count >= room) cut();
    }
    void cut() { cut(k); }  // to the k largest
    void cut(int most) {
        if (count <= most) return;
        // Bisect the range of keys until `most` lie above its middle: counting is vectorised, where
        // sorting would mispredict branches.
        int32_t low = INT32_MAX, high = INT32_MIN;
        for (int i = 0; i < count; i++) key[i] = ordered(value[i]);
        for (int i = 0; i < count; i++) low = std::min(low, key[i]);
        for (int i = 0; i < count; i++) high = std::max(high, key[i]);
        low = low == INT32_MIN ? low : low - 1;  // all keys are above low, and none is above high
        int above = 0;
        while ((int64_t)high - low > 1) {
            int32_t middle = (int32_t)(((int64_t)low + high) >> 1);
            int found = 0;
            for (int i = 0; i < count; i++) found += key[i] > middle;
            if (found > most) low = middle;
            else {
                high = middle;
                above = found;
                if (found == most) break;
            }
        }
        int kept = 0, equal = most - above;  // how many of those equal to the smallest kept value, the first ones
        float least = -NOTHING;
        for (int i = 0; i < count; i++) {
            bool take = key[i] > high;
            if (!take && key[i] == high && equal > 0) {
                take = true;
                equal--;
            }
            value[kept] = value[i];
            latent[kept] = latent[i];
            kept += take;
        }
        for (int i = 0; i < kept; i++) least = std::min(least, value[i]);
        count = kept;
        bar = least;
    }
    void drop(int at) {
        std::copy(value.begin() + at + 1, value.begin() + count, value.begin() + at);
        std::copy(latent.begin() + at + 1, latent.begin() + count, latent.begin() + at);
        count--;
    }
};

// A bit for each of COUNT values, at most 64: whether it is above the bar.
template <int COUNT>
uint64_t above(const float* block, float bar) {
    uint64_t found = 0;
#if defined(__AVX2__) && !defined(KS_PORTABLE)
    for (int l = 0; l < COUNT; l += 8)
        found |= (uint64_t)(uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(block + l), _mm256_set1_ps(bar), _CMP_GT_OQ)) << l;
#else
    int hits = 0;
    for (int l = 0; l < COUNT; l++) hits += block[l] > bar;
    if (hits)
        for (int l = 0; l < COUNT; l++) found |= (uint64_t)(block[l] > bar) << l;
#endif
    return found;
}

// Offers score(i) for all i in [begin, end). A value that is not above the bar costs one comparison.
template <class Score>
void offer_all(Best& best, int64_t begin, int64_t end, Score score) {
    float block[LANES];
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES) {
        for (int l = 0; l < LANES; l++) block[l] = score(i + l);
        for (uint64_t left = above<LANES>(block, best.bar); left; left &= left - 1) {
            int l = __builtin_ctzll(left);
            best.offer(block[l], (int32_t)(i + l));
        }
    }
    for (; i < end; i++) best.offer(score(i), (int32_t)i);
}

// Leaves the best.k largest scores of all i < n in best. A sample of blocks gives a bar that most likely
// has k values above it, so that few other values pass it. Where it has fewer, all are scanned again.
template <class Score>
void scan(Best& best, Best& sample, int64_t n, Score score) {
    best.clear();
    if (n >= 64 * (int64_t)best.k) {
        sample.clear();
        for (int64_t i = 0; i + LANES <= n; i += LANES * EVERY) offer_all(sample, i, i + LANES, score);
        sample.cut();
        if (sample.count == sample.k) best.clear(sample.bar);
    }
    offer_all(best, 0, n, score);
    if (best.count < best.k) {
        best.clear();
        offer_all(best, 0, n, score);
    }
    best.cut();
}

int sample_of(int k) { return std::max(2, 2 * k / EVERY); }

void put(const Best& best, int k, float* values, int32_t* indices) {
    for (int j = 0; j < k; j++) {  // fewer than k only where values are NaN
        bool there = j < best.count;
        values[j] = there ? best.value[j] : std::numeric_limits<float>::quiet_NaN();
        indices[j] = there ? best.latent[j] : 0;
    }
}

float bfloat(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

uint16_t to_bfloat(float value) {  // to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

float quantize(const float* row, int8_t* out, int64_t d) {  // returns the scale
    float largest = 0;
    for (int64_t i = 0; i < d; i++) largest = std::fabs(row[i]) > largest ? std::fabs(row[i]) : largest;
    float scale = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
    for (int64_t i = 0; i < d; i++) out[i] = (int8_t)(int32_t)(row[i] * inverse + (row[i] < 0 ? -0.5f : 0.5f));
    return scale;
}

// Reranks the candidates in best, and writes the k best by exact value. best holds the c largest scores
// and, unless there are no more, the next one. A score is its value * unit.
void settle(Best& best, Best& chosen, int c, float unit, const float* x, const float* weight, const float* bias, int64_t d, int k, float* values,
            int32_t* indices, float* dropped, float* spread) {
    *dropped = best.bar == NOTHING ? NOTHING : -NOTHING;  // all are candidates; or the bar was too high, and nothing is certain
    if (best.count > c) {  // the best score that is not a candidate
        int least = (int)(std::min_element(best.value.begin(), best.value.begin() + best.count) - best.value.begin());
        *dropped = best.value[least] * unit;
        best.drop(least);
    }
    chosen.clear();
    double square = 0;
    for (int j = 0; j < best.count; j++) {
        int32_t latent = best.latent[j];
        if (j + 1 < best.count) fetch(weight + (int64_t)best.latent[j + 1] * d, d);
        float exact = dot(x, weight + (int64_t)latent * d, d) + bias[latent], off = exact - best.value[j] * unit;
        square += (double)off * off;
        chosen.offer(exact, latent);
    }
    chosen.cut();
    put(chosen, k, values, indices);
    *spread = (float)std::sqrt(square / std::max(1, best.count));
}

// Adds a token's decoder rows to out[d], each times its value; values[k] are clamped to >= 0 in place.
void add_rows(float* out, const float* weight, int64_t d, int k, float* values, const int32_t* indices) {
    for (int j = 0; j < k; j++) {
        values[j] = values[j] < 0 ? 0 : values[j];  // a NaN stays one
        if (j + 1 < k && values[j + 1] > 0) fetch(weight + (int64_t)indices[j + 1] * d, d);
        if (values[j] != 0) add_scaled(out, values[j], weight + (int64_t)indices[j] * d, d);
    }
}

// slopes[k] = <error, row> of each latent whose value is above 0, else 0.
void take_slopes(const float* error, const float* weight, int64_t d, int k, const float* values, const int32_t* indices, float* slopes) {
    for (int j = 0; j < k; j++) slopes[j] = values[j] > 0 ? dot(error, weight + (int64_t)indices[j] * d, d) : 0;
}

// ---- the product of bytes, for processors on which it is the fastest
//
// Tokens are 7 bits and a sign, as u = q + 64 >= 0. Latents are bytes, scaled so that in each SPAN of a
// row neither the positive nor the negative ones reach 32767 / 127 in sum: then the products of a span
// fit 16 bits. Latents are stored in panels of PANEL: for every four components, a panel has these four
// of each of its latents. After the scales of all latents come their shifts, which subtract the
// contribution of the 64 in every u.
const int PANEL = 16, SPAN = 32, TOKENS = 6, BLOCK = 192;  // TOKENS are multiplied with a panel at a time, BLOCK while it is in cache

int64_t padded(int64_t count, int64_t to) { return (count + to - 1) / to * to; }

void pack(const float* row, int64_t i, int64_t n, int64_t d, int8_t* low, float* scale) {
    const float most = 32767 / 127 - SPAN / 2;  // rounding adds up to a half each
    int64_t depth = padded(d, SPAN);
    int8_t* out = low + i / PANEL * PANEL * depth + i % PANEL * 4;
    float limit = 0, last[SPAN] = {};
    std::copy(row + d / SPAN * SPAN, row + d, last);
    auto span = [=, &last](int64_t at) { return at + SPAN <= d ? row + at : last; };
    for (int64_t at = 0; at < depth; at += SPAN) {
        const float* x = span(at);
        float sum = 0, size = 0, largest = 0;
        for (int c = 0; c < SPAN; c++) sum += x[c];
        for (int c = 0; c < SPAN; c++) size += std::fabs(x[c]);
        for (int c = 0; c < SPAN; c++) largest = std::fabs(x[c]) > largest ? std::fabs(x[c]) : largest;
        limit = std::max({limit, (size + std::fabs(sum)) / 2 / most, largest / 127});  // the sum of the sign with the larger one
    }
    float inverse = limit > std::numeric_limits<float>::min() ? 1 / limit : 0;
    int32_t sum = 0;
    for (int64_t at = 0; at < depth; at += SPAN) {
        const float* x = span(at);
        int8_t q[SPAN];
        for (int c = 0; c < SPAN; c++) q[c] = (int8_t)(int32_t)(x[c] * inverse + (x[c] < 0 ? -0.5f : 0.5f));
        for (int c = 0; c < SPAN; c++) sum += q[c];
        for (int c = 0; c < SPAN; c += 4) std::memcpy(out + (at + c) * PANEL, q + c, 4);
    }
    scale[i] = limit;
    scale[padded(n, PANEL) + i] = -64 * (float)sum * limit;
}

float shift_up(const float* row, uint8_t* out, int64_t d) {  // returns the scale, 1 for a row of zeros
    float largest = 0;
    for (int64_t c = 0; c < d; c++) largest = std::fabs(row[c]) > largest ? std::fabs(row[c]) : largest;
    float inverse = largest > 63 * std::numeric_limits<float>::min() ? 63 / largest : 0;
    for (int64_t c = 0; c < d; c++) out[c] = (uint8_t)(64 + (int32_t)(row[c] * inverse + (row[c] < 0 ? -0.5f : 0.5f)));
    return inverse > 0 ? largest / 63 : 1;
}

// out[TOKENS, PANEL] = u[TOKENS, depth] times a panel, in integers.
#if defined(__AVX2__) && !defined(KS_PORTABLE)
__attribute__((noinline))  // it needs all registers
void multiply(const uint8_t* u, const int8_t* panel, int64_t depth, int32_t* out) {
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum[TOKENS][2];
    for (auto& row : sum) row[0] = row[1] = _mm256_setzero_si256();
    for (int64_t at = 0; at < depth; at += SPAN, panel += SPAN * PANEL) {
        __m256i part[TOKENS][2];
#pragma GCC unroll 8
        for (int s = 0; s < SPAN / 4; s++) {
            __m256i left = _mm256_loadu_si256((const __m256i*)(panel + s * 64)), right = _mm256_loadu_si256((const __m256i*)(panel + s * 64 + 32));
#pragma GCC unroll 6
            for (int t = 0; t < TOKENS; t++) {
                int32_t four;
                std::memcpy(&four, u + t * depth + at + s * 4, 4);
                __m256i token = _mm256_set1_epi32(four), a = _mm256_maddubs_epi16(token, left), b = _mm256_maddubs_epi16(token, right);
                part[t][0] = s ? _mm256_add_epi16(part[t][0], a) : a;
                part[t][1] = s ? _mm256_add_epi16(part[t][1], b) : b;
                asm("" : "+x"(part[t][0]), "+x"(part[t][1]));  // keeps this order: a compiler that adds pairs first runs out of registers
            }
        }
        for (int t = 0; t < TOKENS; t++)
            for (int h = 0; h < 2; h++) sum[t][h] = _mm256_add_epi32(sum[t][h], _mm256_madd_epi16(part[t][h], ones));
    }
    for (int t = 0; t < TOKENS; t++)
        for (int h = 0; h < 2; h++) _mm256_storeu_si256((__m256i*)(out + t * PANEL + h * 8), sum[t][h]);
}
#else
void multiply(const uint8_t* u, const int8_t* panel, int64_t depth, int32_t* out) {
    std::fill(out, out + TOKENS * PANEL, 0);
    for (int64_t at = 0; at < depth; at += 4)
        for (int t = 0; t < TOKENS; t++)
            for (int l = 0; l < PANEL; l++)
                for (int c = 0; c < 4; c++) out[t * PANEL + l] += (int32_t)u[t * depth + at + c] * panel[at * PANEL + l * 4 + c];
}
#endif

}  // namespace

extern "C" {

int ks_version() { return 1; }

// pre[b, n] (without bias) and bias[n] -> values[b, k], indices[b, k]: the k largest of pre + bias,
// ordered by latent.
void ks_select(const float* pre, const float* bias, int64_t b, int64_t n, int k, float* values, int32_t* indices, int threads) {
    parallel(even(b, threads), [=](int, int64_t begin, int64_t end) {
        Best best(k), sample(sample_of(k));
        for (int64_t row = begin; row < end; row++) {
            const float* p = pre + row * n;
            scan(best, sample, n, [=](int64_t i) { return p[i] + bias[i]; });
            put(best, k, values + row * k, indices + row * k);
        }
    });
}

// Quantizes rows. kind 1: int8 with a scale for each row; 2: bfloat16; 3: panels of ks_screen, with
// scales and shifts.
void ks_lower(const float* x, int64_t b, int64_t d, int kind, void* out, float* scale, int threads) {
    parallel(even(b, threads), [=](int, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            if (kind == 1) scale[row] = quantize(x + row * d, (int8_t*)out + row * d, d);
            else if (kind == 3) pack(x + row * d, row, b, d, (int8_t*)out, scale);
            else for (int64_t i = 0; i < d; i++) ((uint16_t*)out)[row * d + i] = to_bfloat(x[row * d + i]);
        }
    });
}

// Reranks low-precision products of tokens and latents: the k best of c candidates by exact value.
//   low[b, n]   kind 1: int32 sums, to be scaled by x_scale[b] w_scale[n]; kind 2: bfloat16
//   dropped[b]  the best score that was not a candidate
//   spread[b]   the root mean square of (exact - score) over the candidates
void ks_rescore(const void* low, int kind, const float* x_scale, const float* w_scale, const float* bias, const float* x, const float* weight,
                int64_t b, int64_t n, int64_t d, int k, int c, float* values, int32_t* indices, float* dropped, float* spread, int threads) {
    parallel(even(b, threads), [=](int, int64_t begin, int64_t end) {
        Best best(c + 1), sample(sample_of(c + 1)), chosen(k);
        for (int64_t row = begin; row < end; row++) {
            if (kind == 1) {
                const int32_t* p = (const int32_t*)low + row * n;
                float by = x_scale[row];
                scan(best, sample, n, [=](int64_t i) { return (float)p[i] * by * w_scale[i] + bias[i]; });
            } else {
                const uint16_t* p = (const uint16_t*)low + row * n;
                scan(best, sample, n, [=](int64_t i) { return bfloat(p[i]) + bias[i]; });
            }
            settle(best, chosen, c, 1, x + row * d, weight, bias, d, k, values + row * k, indices + row * k, dropped + row, spread + row);
        }
    });
}

// As ks_rescore, from tokens x[b, d] and latents in panels. The full product is never materialised: a
// panel's scores are compared while they are in registers. An eighth of the panels sets a bar that about
// three times c scores are expected to pass; where fewer than c do, dropped is infinite.
void ks_screen(const int8_t* low, const float* scale, const float* bias, const float* x, const float* weight, int64_t b, int64_t n, int64_t d, int k,
               int c, float* values, int32_t* indices, float* dropped, float* spread, int threads) {
    int64_t depth = padded(d, SPAN), wide = padded(n, PANEL);
    std::vector<float> biases(wide, 0);
    std::copy(bias, bias + n, biases.begin());
    parallel(even(b, threads), [&](int, int64_t begin, int64_t end) {
        std::vector<uint8_t> u(BLOCK * depth, 64);
        std::vector<float> unit(BLOCK), inverse(BLOCK);
        std::vector<Best> best(std::min<int64_t>(BLOCK, end - begin), Best(c + 1, 4));
        Best chosen(k);
        int32_t product[TOKENS * PANEL];
        for (int64_t first = begin; first < end; first += BLOCK) {
            int64_t count = std::min<int64_t>(BLOCK, end - first);
            for (int64_t t = 0; t < count; t++) {
                unit[t] = shift_up(x + (first + t) * d, u.data() + t * depth, d);
                inverse[t] = 1 / unit[t];
                best[t].clear();
            }
            int64_t sampled = wide / PANEL / EVERY;
            for (int64_t p = 0; p < wide / PANEL; p++) {
                if (p == sampled && n >= 64 * (int64_t)c)
                    for (int64_t t = 0; t < count; t++) best[t].cut(3 * (c + 1) / EVERY + 1);
                const float *by = scale + p * PANEL, *shift = by + wide, *extra = biases.data() + p * PANEL;
                for (int64_t at = 0; at < count; at += TOKENS) {
                    multiply(u.data() + at * depth, low + p * PANEL * depth, depth, product);
                    for (int64_t t = at; t < std::min(count, at + TOKENS); t++) {
                        float score[PANEL], with = inverse[t];
                        const int32_t* sums = product + (t - at) * PANEL;
                        for (int l = 0; l < PANEL; l++) score[l] = (float)sums[l] * by[l] + (shift[l] + extra[l] * with);
                        for (uint64_t left = above<PANEL>(score, best[t].bar); left; left &= left - 1) {
                            int l = __builtin_ctzll(left);
                            best[t].offer(score[l], (int32_t)(p * PANEL + l));
                        }
                    }
                }
            }
            for (int64_t t = 0, row = first; t < count; t++, row++) {
                best[t].cut();
                settle(best[t], chosen, c, unit[t], x + row * d, weight, bias, d, k, values + row * k, indices + row * k, dropped + row, spread + row);
            }
        }
    });
}

// values[b, k] (clamped to >= 0 in place) -> error[b, d] = reconstruction - x, square[b] = its squared
// norm, slopes[b, k] = <error, row> where the value is above 0, else 0.
void ks_decode(const float* x, const float* b_pre, const float* weight, int64_t b, int64_t d, int k, float* values, const int32_t* indices,
               float* error, float* square, float* slopes, int threads) {
    parallel(even(b, threads), [=](int, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            float* e = error + row * d;
            for (int64_t i = 0; i < d; i++) e[i] = b_pre[i] - x[row * d + i];
            add_rows(e, weight, d, k, values + row * k, indices + row * k);
            square[row] = dot(e, e, d);
            take_slopes(e, weight, d, k, values + row * k, indices + row * k, slopes + row * k);
        }
    });
}

// The two halves of ks_decode, for a shard of the latents: values[b, k] (clamped to >= 0 in place) ->
// recon[b, d], its share of the reconstruction; and error[b, d] of all shards -> square[b], slopes[b, k].
void ks_reconstruct(const float* weight, int64_t b, int64_t d, int k, float* values, const int32_t* indices, float* recon, int threads) {
    parallel(even(b, threads), [=](int, int64_t begin, int64_t end) {
        std::fill(recon + begin * d, recon + end * d, 0.f);
        for (int64_t row = begin; row < end; row++) add_rows(recon + row * d, weight, d, k, values + row * k, indices + row * k);
    });
}

void ks_slopes(const float* weight, int64_t b, int64_t d, int k, const float* values, const int32_t* indices, const float* error, float* square,
               float* slopes, int threads) {
    parallel(even(b, threads), [=](int, int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; row++) {
            square[row] = dot(error + row * d, error + row * d, d);
            take_slopes(error + row * d, weight, d, k, values + row * k, indices + row * k, slopes + row * k);
        }
    });
}

// Sorts the entries above 0 of values[m] by latent: those of latent i are order[starts[i] .. starts[i +
// 1]], in the order of tokens.
void ks_transpose(const float* values, const int32_t* indices, int64_t m, int64_t n, int64_t* starts, int32_t* order) {
    std::fill(starts, starts + n + 1, 0);
    for (int64_t i = 0; i < m; i++) starts[indices[i] + 1] += values[i] > 0;
    for (int64_t i = 0; i < n; i++) starts[i + 1] += starts[i];
    std::vector<int64_t> next(starts, starts + n);
    for (int64_t i = 0; i < m; i++)
        if (values[i] > 0) order[next[indices[i]]++] = (int32_t)i;
}

struct Matrix {  // a weight [n, d] with its moments and average (null: none)
    float *weight, *first, *second, *average;
};

struct Adam {
    float rate, beta1, beta2, eps, correction1, correction2;  // corrections: 1 - beta^step
    float decay;                                              // of the average
    float clip;                                               // factor on all gradients
};

static void adam(float* w, float* m, float* v, const float* g, int64_t d, const Adam& a) {
    float step = a.rate / a.correction1, root = 1 / std::sqrt(a.correction2);
    for (int64_t i = 0; i < d; i++) {
        float slope = g[i] * a.clip;
        m[i] = m[i] + (slope - m[i]) * (1 - a.beta1);
        v[i] = v[i] * a.beta2 + slope * slope * (1 - a.beta2);
        w[i] -= step * m[i] / (std::sqrt(v[i]) * root + a.eps);
    }
}

static void average(float* mean, const float* w, int64_t d, float decay) {
    if (mean) for (int64_t i = 0; i < d; i++) mean[i] += (w[i] - mean[i]) * (1 - decay);
}

// One pass over the latents: computes both gradient rows of a latent in cache and uses them at once.
//   W_dec's gradient: scale * sum of values * error, without the component along the row if unit_norm
//   W_enc's gradient: scale * sum of slopes * (x - b_pre)
//   extra_of[n]       row of extra_dec, extra_enc [m, d] and extra_bias[m] that is added (AuxK's), or -1
//   apply             0: only the norms
//   norms[threads]    sums of squares of all gradients but b_pre's
//   pull[threads, d]  sum of (b_enc's gradient) * (row of W_enc)
//   low               W_enc quantized (kind as above), rewritten for each latent, with low_scale[n] if
//                     int8 (scales and shifts if panels)
void ks_update(int64_t n, int64_t d, int k, const int64_t* starts, const int32_t* order, const float* values, const float* slopes, const float* error,
               const float* x, const float* b_pre, float scale, const int32_t* extra_of, const float* extra_dec, const float* extra_enc,
               const float* extra_bias, Matrix enc, Matrix dec, float* b_enc, float* b_first, float* b_second, float* b_average, const Adam* rule,
               float bias_rate, int unit_norm, int train_bias, int apply, int kind, void* low, float* low_scale, double* norms, float* pull, int threads) {
    std::vector<int64_t> borders(1, 0);  // of equal work: entries, plus a fixed cost of each latent
    int64_t total = starts[n] + 8 * n, at = 0;
    for (int t = 1; t < threads; t++) {
        while (at < n && starts[at] + 8 * at < total * t / threads) at++;
        borders.push_back(at);
    }
    borders.push_back(n);
    parallel(borders, [=](int thread, int64_t begin, int64_t end) {
        std::vector<float> g_dec(d), g_enc(d), row(d);
        double norm = 0;
        float* mine = pull + thread * d;
        for (int64_t i = begin; i < end; i++) {
            std::fill(g_dec.begin(), g_dec.end(), 0.f);
            std::fill(g_enc.begin(), g_enc.end(), 0.f);
            float g_bias = 0;
            for (int64_t e = starts[i]; e < starts[i + 1]; e++) {
                int64_t token = order[e] / k;
                if (e + 2 < starts[n]) {  // of this latent or the next one
                    int64_t ahead = order[e + 2] / k;
                    fetch(error + ahead * d, d);
                    fetch(x + ahead * d, d);
                }
                add_scaled(g_dec.data(), scale * values[order[e]], error + token * d, d);
                add_scaled(g_enc.data(), scale * slopes[order[e]], x + token * d, d);
                g_bias += scale * slopes[order[e]];
            }
            add_scaled(g_enc.data(), -g_bias, b_pre, d);
            if (extra_of && extra_of[i] >= 0) {
                add_scaled(g_dec.data(), 1, extra_dec + (int64_t)extra_of[i] * d, d);
                add_scaled(g_enc.data(), 1, extra_enc + (int64_t)extra_of[i] * d, d);
                g_bias += extra_bias[extra_of[i]];
            }
            float *w_enc = enc.weight + i * d, *w_dec = dec.weight + i * d;
            if (unit_norm) add_scaled(g_dec.data(), -dot(g_dec.data(), w_dec, d), w_dec, d);
            norm += (double)dot(g_dec.data(), g_dec.data(), d) + dot(g_enc.data(), g_enc.data(), d) + (train_bias ? (double)g_bias * g_bias : 0);
            if (g_bias != 0) add_scaled(mine, g_bias, w_enc, d);
            if (!apply) continue;
            adam(w_enc, enc.first + i * d, enc.second + i * d, g_enc.data(), d, *rule);
            adam(w_dec, dec.first + i * d, dec.second + i * d, g_dec.data(), d, *rule);
            if (train_bias) {
                Adam bias = *rule;
                bias.rate = bias_rate;
                adam(b_enc + i, b_first + i, b_second + i, &g_bias, 1, bias);
            }
            if (unit_norm) {
                float length = std::sqrt(dot(w_dec, w_dec, d)), inverse = length > 0 ? 1 / length : 1;
                for (int64_t c = 0; c < d; c++) w_dec[c] *= inverse;
            }
            average(enc.average ? enc.average + i * d : nullptr, w_enc, d, rule->decay);
            average(dec.average ? dec.average + i * d : nullptr, w_dec, d, rule->decay);
            average(b_average ? b_average + i : nullptr, b_enc + i, 1, rule->decay);
            if (kind == 1) low_scale[i] = quantize(w_enc, (int8_t*)low + i * d, d);
            if (kind == 2) for (int64_t c = 0; c < d; c++) ((uint16_t*)low)[i * d + c] = to_bfloat(w_enc[c]);
            if (kind == 3) pack(w_enc, i, n, d, (int8_t*)low, low_scale);
        }
        norms[thread] = norm;
    });
}

}  // extern "C"
