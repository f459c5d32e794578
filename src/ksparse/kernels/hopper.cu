// Candidates for the largest numbers of each row of a product of bytes, x[b, d] w[n, d]^T, on Hopper
// GPUs (compute capability 9.0).
//
//     x: 128 tokens, resident            ─┐
//     w: a tile of latents x 128 bytes   ─┴▶ tensor cores ─▶ scores in registers
//        (ring of STAGES chunks, filled by the copy engine;
//        each half is shared with the neighbouring multiprocessor)
//     scores above the token's limit     ─▶ list ─▶ the c best
//
// A block goes over all latents with its tokens. A token's limit is the c-th largest score seen so
// far, so that of n latents only about c ln(n / c) are ever listed. All others cost a
// multiplication, an addition and a comparison. A warp owns 16 tokens, their limits and lists; warps
// share nothing but the ring. hopper.py documents the constants in capitals.

typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int TOKENS = 128, CHUNK = 128;
constexpr int HELD = LATENTS / 2;  // numbers of a tile held by one thread
constexpr u32 X_TILE = TOKENS * CHUNK, W_TILE = LATENTS * CHUNK, COLUMNS_TILE = LATENTS * 8;
constexpr u32 STAGE = W_TILE + (RESIDENT ? 0 : X_TILE);
constexpr int SIDES = (STAGES + CHUNKS) / CHUNKS;  // a tile's scales arrive with its last chunk; tiles in use at once
constexpr u32 X_AT = STAGES * STAGE, COLUMNS_AT = X_AT + (RESIDENT ? CHUNKS * X_TILE : 0), BARRIERS_AT = COLUMNS_AT + SIDES * COLUMNS_TILE;
constexpr int CAPACITY = 32 * PER, FULL = CAPACITY / 4 - 16;  // of a lane's list; four groups of eight numbers can add 16 more of a token
constexpr u32 ALL = 0xffffffff;

#define INFINITE __int_as_float(0x7f800000)

struct alignas(64) Map {
    u64 opaque[16];
};

// ---- barriers and copies

__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void barrier_arrive(u32 barrier, u32 block) {  // on the barrier of a block of the cluster
    asm volatile(
        "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(block)
        : "memory");
}

__device__ __forceinline__ void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n.reg .pred done;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra READY;\nbra AGAIN;\nREADY:\n}" ::"r"(
            barrier),
        "r"(parity)
        : "memory");
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void copy_box(u32 to, const Map &map, u32 barrier, int column, int row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::"r"(to), "l"(&map),
                 "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

__device__ __forceinline__ void copy_box_to_both(u32 to, const Map &map, u32 barrier, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
        "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"((unsigned short)3)
        : "memory");
}

__device__ __forceinline__ void copy_bytes(u32 to, const void *from, u32 barrier, u32 bytes) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
                 : "memory");
}

// ---- tensor cores

// A matrix descriptor for the tensor cores: rows of 128 bytes, swizzled in groups of eight. In units
// of 16 bytes, so that other matrices' descriptors follow by addition.
__device__ __forceinline__ u32 matrix_at(u32 address) { return (address & 0x3ffff) >> 4 | 1 << 16; }
__device__ __forceinline__ u64 matrix(u32 at) { return (u64)0x40000040 << 32 | at; }

#define FOUR(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define NAMES_64                                                                                                                                     \
    "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"                         \
    "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define NAMES_128                                                                                                                                    \
    NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,"     \
             "%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,"       \
             "%122,%123,%124,%125,%126,%127"

// d = (d += if more) the product of 64 rows and 128 (or 256) rows of 32 bytes.
__device__ __forceinline__ void multiply(int (&d)[64], u64 left, u64 right, int more) {
    asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %66, 0;\nwgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" NAMES_64 "}, %64, %65, more;\n}"
                 : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48)
                 : "l"(left), "l"(right), "r"(more));
}

__device__ __forceinline__ void multiply(int (&d)[128], u64 left, u64 right, int more) {
    asm volatile("{\n.reg .pred more;\nsetp.ne.b32 more, %130, 0;\nwgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {" NAMES_128 "}, %128, %129, more;\n}"
                 : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48), SIXTEEN(64), SIXTEEN(80), SIXTEEN(96), SIXTEEN(112)
                 : "l"(left), "l"(right), "r"(more));
}

__device__ __forceinline__ void multiply_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void multiply_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

// ---- lists

__device__ __forceinline__ u32 ordered(u32 bits) {  // a float's bits as an unsigned integer of the same order
    return bits ^ ((bits >> 31) ? ALL : 0x80000000);
}

__device__ __forceinline__ float score_of(u32 number) { return __uint_as_float(number ^ ((number >> 31) ? 0x80000000 : ALL)); }

// Append (score, latent) to a lane's list if the score is above the limit. Without a branch, since
// the lanes of a warp rarely agree.
__device__ __forceinline__ void store_above(u64 *&to, int score, float limit, u32 latent) {
    asm volatile("{\n.reg .pred above;\nsetp.gt.f32 above, %1, %2;\n@above st.global.v2.b32 [%0], {%4, %3};\n@above add.s64 %0, %0, 32;\n}"
                 : "+l"(to)
                 : "f"(__int_as_float(score)), "f"(limit), "r"(score), "r"(latent)
                 : "memory");
}

struct Kept {
    int count;
    float limit;
};

// Shorten a token's list, whose scores are all above `limit`, to its c (to `most`) best, in their order
// and evenly spread over the four lanes. Each lane has `count` entries now.
__device__ __noinline__ Kept shrink(u64 *list, int count, float limit, int c, int most, int lane) {
    u64 key[PER];
    u32 number[PER], low = ordered(__float_as_uint(limit)), high = 0;
    int there = 0;  // number of scores that are at least `low`
    __syncwarp();
#pragma unroll
    for (int j = 0; j < PER; ++j) {
        const bool valid = 8 * j + lane / 4 < count;
        if (valid) key[j] = list[32 * j + lane];
        number[j] = valid ? ordered(key[j] >> 32) : 0;
        high = max(high, number[j]);
        there += __popc(__ballot_sync(ALL, valid));
    }
    high = __reduce_max_sync(ALL, high);
    while (low < high) {
        u32 middle = low + (high - low) / 2 + ((high - low) & 1);
        int above = 0;
#pragma unroll
        for (int j = 0; j < PER; ++j) above += __popc(__ballot_sync(ALL, number[j] >= middle));
        if (above >= c) {
            low = middle, there = above;
            if (there <= most) break;
        } else high = middle - 1;
    }
    int spare = there;  // how many scores equal to `low` to keep
    if (there > most) {
        spare = c;
#pragma unroll
        for (int j = 0; j < PER; ++j) spare -= __popc(__ballot_sync(ALL, number[j] > low));
    }
    u32 before = (1u << lane) - 1;
    int equals = 0, kept = 0;
#pragma unroll
    for (int j = 0; j < PER; ++j) {
        u32 equal = __ballot_sync(ALL, number[j] == low);
        bool keep = number[j] > low || (number[j] == low && equals + __popc(equal & before) < spare);
        u32 all = __ballot_sync(ALL, keep);
        if (keep) list[kept + __popc(all & before)] = key[j];
        kept += __popc(all), equals += __popc(equal);
    }
    __syncwarp();
    return {kept, score_of(low)};
}

// A warp's 16 tokens. The four lanes of a quad share tokens lane / 4 and lane / 4 + 8: each has every
// fourth slot of their lists, starting at its number in the quad, so that none waits for another when
// a score is added.
struct Tokens {
    u64 *lists, *to[2];
    float limit[2];
    int lane;

    __device__ __forceinline__ u64 *list(int token) const { return lists + token * CAPACITY; }
    __device__ __forceinline__ u64 *start(int half) const { return list(lane / 4 + 8 * half) + (lane & 3); }
    __device__ __forceinline__ int count(int half) const { return (int)((char *)to[half] - (char *)start(half)) >> 5; }

    // Append those of eight scores that are above their token's limit: two of one token, two of the
    // other, in turn.
    __device__ __forceinline__ void offer(const int *score, u32 latent) {
#pragma unroll
        for (int i = 0; i < 8; ++i) store_above(to[i % 4 / 2], score[i], limit[i % 4 / 2], latent + i / 4 * 8 + i % 2);
    }

    // Where a lane has more than `full` scores of a token, keep the token's c best, or up to `most` if
    // that is found sooner.
    __device__ __forceinline__ void tidy(int full, int c, int most) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int size = count(half);
            u32 which = __ballot_sync(ALL, size > full);
            while (which) {
                const int first = (__ffs(which) - 1) & 28;
                which &= ~(15u << first);
                const Kept kept = shrink(list(first / 4 + 8 * half), __shfl_sync(ALL, size, first | (lane & 3)), __shfl_sync(ALL, limit[half], first), c, most, lane);
                if ((lane & 28) == first) to[half] = start(half) + (kept.count + 3 - (lane & 3)) / 4 * 4, limit[half] = kept.limit;
            }
        }
    }

    __device__ __forceinline__ bool crowded() const { return max(count(0), count(1)) > FULL; }
};

// ---- the kernel: one warp copies, eight multiply

__device__ __forceinline__ u32 base() {
    extern __shared__ __align__(1024) unsigned char memory[];
    return (u32)__cvta_generic_to_shared(memory);
}

__device__ __forceinline__ u32 full(u32 slot) { return base() + BARRIERS_AT + 8 * slot; }
__device__ __forceinline__ u32 empty(u32 slot) { return full(STAGES + slot); }
__device__ __forceinline__ u32 x_full() { return full(2 * STAGES); }

struct Ring {
    u32 slot, parity;

    __device__ __forceinline__ void advance() {
        if (++slot == STAGES) slot = 0, parity ^= 1;
    }
};

__device__ __forceinline__ void feed(const Map &x, const Map &w, const float2 *columns, int first, int last) {
    const int token = blockIdx.x * TOKENS, rank = CLUSTER == 1 ? 0 : blockIdx.x % 2;
    if (RESIDENT) {
        barrier_expect(x_full(), CHUNKS * X_TILE);
        for (int chunk = 0; chunk < CHUNKS; ++chunk) copy_box(base() + X_AT + chunk * X_TILE, x, x_full(), chunk * CHUNK, token);
    }
    Ring ring = {0, 1};
    for (int tile = first; tile < last; ++tile) {
        for (int chunk = 0; chunk < CHUNKS; ++chunk, ring.advance()) {
            const u32 to = base() + ring.slot * STAGE, barrier = full(ring.slot);
            const bool end = chunk == CHUNKS - 1;
            barrier_wait(empty(ring.slot), ring.parity);
            barrier_expect(barrier, STAGE + (end ? COLUMNS_TILE : 0));
            if (CLUSTER == 1) {
                copy_box(to, w, barrier, chunk * CHUNK, tile * LATENTS);
                copy_box(to + W_TILE / 2, w, barrier, chunk * CHUNK, tile * LATENTS + LATENTS / 2);
            } else copy_box_to_both(to + rank * (W_TILE / 2), w, barrier, chunk * CHUNK, tile * LATENTS + rank * (LATENTS / 2));
            if (!RESIDENT) copy_box(to + W_TILE, x, barrier, chunk * CHUNK, token);
            if (end) copy_bytes(base() + COLUMNS_AT + (tile - first) % SIDES * COLUMNS_TILE, columns + (u64)tile * LATENTS, barrier, COLUMNS_TILE);
        }
    }
}

// One of the eight warps: multiplies 64 tokens with three others, and selects for its own 16.
struct Worker {
    Tokens mine;
    Ring ring;
    float unit[2];
    u32 half;  // which half of the block's tokens
    int first, c;

    __device__ __forceinline__ void release(u32 slot) {
        if (mine.lane < CLUSTER) barrier_arrive(empty(slot), mine.lane);
    }

    // d = the product of the next tile.
    __device__ __forceinline__ void product(int (&d)[HELD]) {
        u32 held = STAGES;
#pragma unroll 1
        for (int chunk = 0; chunk < CHUNKS; ++chunk, ring.advance()) {
            const u32 latents = matrix_at(base()) + ring.slot * (STAGE >> 4);
            const u32 tokens = (RESIDENT ? matrix_at(base() + X_AT) + chunk * (X_TILE >> 4) : latents + (W_TILE >> 4)) + half * (64 * CHUNK >> 4);
            barrier_wait(full(ring.slot), ring.parity);
            multiply_begin();
#pragma unroll
            for (int k = 0; k < CHUNK / 32; ++k) multiply(d, matrix(tokens + 2 * k), matrix(latents + 2 * k), chunk > 0 || k > 0);
            multiply_commit();
            if (held < STAGES) {
                multiply_wait<1>();
                release(held);
            }
            held = ring.slot;
        }
        multiply_wait<0>();
        release(held);
#pragma unroll
        for (int i = 0; i < HELD; ++i) asm volatile("" : "+r"(d[i])::"memory");  // nothing below may be moved above this
    }

    // Compute a tile's scores, and append those above their limits to the lists.
    __device__ __forceinline__ void select(int (&d)[HELD], int tile) {
        const u32 side = base() + COLUMNS_AT + (tile - first) % SIDES * COLUMNS_TILE + (mine.lane & 3) * 16, latent = tile * LATENTS + (mine.lane & 3) * 2;
        u32 above = 0;  // which groups of eight numbers have one above its limit
#pragma unroll
        for (int part = 0; part < HELD / 8; ++part) {
            bool any = false;
#pragma unroll
            for (int i = 8 * part; i < 8 * part + 8; i += 4) {
                float scale[2], bias[2];
                asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(scale[0]), "=f"(bias[0]), "=f"(scale[1]), "=f"(bias[1]) : "r"(side + i * 16));
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float score = fmaf((float)d[i + j] * scale[j & 1], unit[j / 2], bias[j & 1]);
                    d[i + j] = __float_as_int(score);
                    any |= score > mine.limit[j / 2];
                }
            }
            above |= (u32)any << part;
        }
        above = __reduce_or_sync(ALL, above);
#pragma unroll
        for (int part = 0; part < HELD / 8; ++part) {
            if (above >> part & 1) mine.offer(d + 8 * part, latent + 16 * part);
            if (part % 4 == 3 && (above >> (part - 3) & 15) && __any_sync(ALL, mine.crowded())) mine.tidy(FULL, c, c + c / 8);
        }
    }

    __device__ __forceinline__ void all_tiles(int end) {
        int d[HELD];
        for (int tile = first; tile < end; ++tile) {
            product(d);
            select(d, tile);
        }
        mine.tidy(-1, c, c);
    }

    // Write the c best of each token, from number `token` on, to row token * gridDim.y + blockIdx.y.
    __device__ __forceinline__ void write(float *scores, long long *latents, float *dropped, int token, int b) const {
        __syncwarp();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            for (int each = 0; each < 8 && token + each + 8 * half < b; ++each) {
                int size = mine.count(half);
                size += __shfl_xor_sync(ALL, size, 1);
                size = __shfl_sync(ALL, size + __shfl_xor_sync(ALL, size, 2), 4 * each);
                const float limit = __shfl_sync(ALL, mine.limit[half], 4 * each);
                const u64 row = (u64)(token + each + 8 * half) * gridDim.y + blockIdx.y;
                for (int j = mine.lane; j < c; j += 32) {
                    const u64 key = j < size ? mine.list(each + 8 * half)[j] : 0;
                    scores[row * c + j] = j < size ? __uint_as_float(key >> 32) : -INFINITE;
                    latents[row * c + j] = (u32)key;
                }
                if (mine.lane == 0) dropped[row] = size < c ? INFINITE : limit;
            }
        }
    }
};

// For s = blockIdx.y and the latents of tiles [tiles s / gridDim.y, tiles (s + 1) / gridDim.y): writes
// the c best of each token to scores and latents[b, s, c], and an upper bound on the others' scores to
// dropped[b, s]. columns[n] holds each latent's scale and bias.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
    candidates(const __grid_constant__ Map x, const __grid_constant__ Map w, const float2 *columns, const float *x_scale, u64 *lists, float *scores,
               long long *latents, float *dropped, int b, int c, int tiles) {
    const int first = blockIdx.y * tiles / gridDim.y, last = (blockIdx.y + 1) * tiles / gridDim.y;
    if (threadIdx.x == 0) {
        for (int slot = 0; slot < STAGES; ++slot) barrier_init(full(slot), 1), barrier_init(empty(slot), 8 * CLUSTER);
        barrier_init(x_full(), 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    cluster_sync();

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) feed(x, w, columns, first, last);
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const int lane = threadIdx.x % 32, warp = (threadIdx.x - 128) / 32, token = blockIdx.x * TOKENS + 16 * warp, row = token + lane / 4;
        Worker worker;
        worker.mine.lists = lists + ((u64)(blockIdx.y * gridDim.x + blockIdx.x) * TOKENS + 16 * warp) * CAPACITY;
        worker.mine.lane = lane;
        worker.mine.to[0] = worker.mine.start(0);
        worker.mine.to[1] = worker.mine.start(1);
        worker.mine.limit[0] = row < b ? -INFINITE : INFINITE;
        worker.mine.limit[1] = row + 8 < b ? -INFINITE : INFINITE;
        worker.ring = {0, 0};
        worker.unit[0] = row < b ? x_scale[row] : 0;
        worker.unit[1] = row + 8 < b ? x_scale[row + 8] : 0;
        worker.half = __shfl_sync(ALL, warp / 4, 0);  // tells the compiler that it is the same in all lanes
        worker.first = first;
        worker.c = c;
        if (RESIDENT) barrier_wait(x_full(), 0);
        worker.all_tiles(last);
        worker.write(scores, latents, dropped, token, b);
    }
    cluster_sync();
}
