// Ranks meet in regions of device memory that each of them has mapped. A rank writes into the others' regions and
// reads only its own, so a meeting costs one way over the link.
//
// Small sums travel as words: four bytes of data beside a four-byte tag, eight bytes that arrive together, so data
// and notice are one. Larger messages are written plainly, then a flag per block, to the same block over there.
// A kernel takes its number from a counter in memory, and counts it up, so a captured graph can be replayed.
// Areas alternate by the number's parity: to finish number n+1 a rank must have heard from every peer in n+1, and a
// peer speaks in n+1 only when its number n is complete; so in n+2 nobody reads the area of n any more.
constexpr int MOST_RANKS = 8, MOST_BLOCKS = 64, SPINS_A_LOOK = 1024;
constexpr i64 FLAGS_AT = 4096;

// The page in host memory: its first word ends everybody's waiting. A record per rank follows.
constexpr int RECORD_WORDS = 64;
enum RecordWord { REASON, OPERATION, PEER, LEFT };
enum Reason : u32 { ABORTED = 1, LATE = 2, PEER_LEFT = 3 };

struct Head { u64 count; u32 error; u32 arrived; };  // at the start of a region; those of lanes have no error

// The structs below are the last parameter of their kernels, and made of eight-byte launch slots.
struct Group {
  char* region[MOST_RANKS];  // by rank of the group
  u32* page;
  u64 patience_ns;
  i64 rank, size, first, operation;  // `first`: rank 0 of the group among all ranks
  i64 words_at, words_slot, plain_at, plain_slot;
};
struct Deal {
  Group group;
  i64 send_at[MOST_RANKS], send[MOST_RANKS], take_at[MOST_RANKS], take[MOST_RANKS];
};
// Messages one way between two ranks: slots and flags stand in the taker's region, `taken` in the giver's.
struct Lane {
  char* own;
  char* other;
  u32* page;
  u64 patience_ns;
  i64 rank, peer, operation;
  i64 head_at, taken_at, flags_at, slots_at, slot_bytes, depth;
};

struct alignas(16) Bits { u32 at[4]; };

__device__ __forceinline__ u32 peek(const u32* from) {
  u32 x;
  asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ void poke(u32* to, u32 x) {
  asm volatile("st.volatile.global.u32 [%0], %1;" : : "l"(to), "r"(x) : "memory");
}
__device__ __forceinline__ u64 acquire(const char* from) {
  u64 x;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(x) : "l"(from) : "memory");
  return x;
}
__device__ __forceinline__ void release(char* to, u64 x) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" : : "l"(to), "l"(x) : "memory");
}
__device__ __forceinline__ Bits read_line(const char* from) {
  Bits x;
  asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(x.at[0]), "=r"(x.at[1]), "=r"(x.at[2]), "=r"(x.at[3])
               : "l"(from)
               : "memory");
  return x;
}
__device__ __forceinline__ void write_line(char* to, const Bits& x) {
  asm volatile("st.volatile.global.v4.u32 [%0], {%1,%2,%3,%4};"
               :
               : "l"(to), "r"(x.at[0]), "r"(x.at[1]), "r"(x.at[2]), "r"(x.at[3])
               : "memory");
}
__device__ __forceinline__ u64 now_ns() {
  u64 x;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(x));
  return x;
}

// Sixteen bytes of a tensor of which `left` elements are there; what is not is zero, and not touched.
template <typename T> __device__ __forceinline__ Bits load_bits(const T* from, i64 left) {
  constexpr int N = 16 / sizeof(T);
  if (left >= N && reinterpret_cast<u64>(from) % 16 == 0) return *reinterpret_cast<const Bits*>(from);
  union { Bits bits; T at[N]; } x;
  x.bits = Bits{{0, 0, 0, 0}};
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (k < left) x.at[k] = from[k];
  return x.bits;
}
template <typename T> __device__ __forceinline__ void store_bits(T* to, i64 left, const Bits& bits) {
  constexpr int N = 16 / sizeof(T);
  if (left >= N && reinterpret_cast<u64>(to) % 16 == 0) {
    *reinterpret_cast<Bits*>(to) = bits;
    return;
  }
  union { Bits bits; T at[N]; } x;
  x.bits = bits;
#pragma unroll
  for (int k = 0; k < N; ++k)
    if (k < left) to[k] = x.at[k];
}

template <typename T> struct Values { float at[16 / sizeof(T)]; };
__device__ __forceinline__ void unpack(const Bits& bits, Values<float>& x) {
#pragma unroll
  for (int k = 0; k < 4; ++k) x.at[k] = __uint_as_float(bits.at[k]);
}
__device__ __forceinline__ void unpack(const Bits& bits, Values<bf16>& x) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    x.at[2 * k] = __uint_as_float(bits.at[k] << 16);
    x.at[2 * k + 1] = __uint_as_float(bits.at[k] & 0xffff0000u);
  }
}
__device__ __forceinline__ Bits pack(const Values<float>& x) {
  Bits bits;
#pragma unroll
  for (int k = 0; k < 4; ++k) bits.at[k] = __float_as_uint(x.at[k]);
  return bits;
}
__device__ __forceinline__ Bits pack(const Values<bf16>& x) {
  Bits bits;
#pragma unroll
  for (int k = 0; k < 4; ++k)
    bits.at[k] = from_float<bf16>(x.at[2 * k]) | static_cast<u32>(from_float<bf16>(x.at[2 * k + 1])) << 16;
  return bits;
}
// sum = part for the first rank, sum + part for the others.
template <typename T> __device__ __forceinline__ void add_part(Values<T>& sum, const Bits& part, bool is_first) {
  Values<T> x;
  unpack(part, x);
#pragma unroll
  for (int k = 0; k < 16 / sizeof(T); ++k) sum.at[k] = is_first ? x.at[k] : sum.at[k] + x.at[k];
}

// What a thread that waits remembers between its looks at the page.
struct Memory { u64 since_ns = 0; int leaving = -1; };

// Whether to go on waiting for `peer`. What ends the wait is kept in the head, and told in the page.
__device__ __noinline__ bool look(Head* head, u32* page, u64 patience_ns, int rank, int operation, int peer,
                                  Memory& memory) {
  if (peek(&head->error)) return false;
  const u64 now = now_ns();
  if (!memory.since_ns) memory.since_ns = now;
  u32 reason = 0;
  if (peek(page)) {
    reason = ABORTED;
  } else if (now - memory.since_ns > patience_ns) {
    reason = LATE;
  } else if (peek(page + (1 + peer) * RECORD_WORDS + LEFT)) {
    // It wrote all it ever will before it left: that may have come since this thread last looked for it.
    if (memory.leaving == peer) reason = PEER_LEFT;
    memory.leaving = peer;
  }
  if (!reason) return true;
  if (atomicCAS(&head->error, 0u, reason) == 0u) {
    u32* record = page + (1 + rank) * RECORD_WORDS;
    poke(record + OPERATION, static_cast<u32>(operation));
    poke(record + PEER, static_cast<u32>(peer));
    __threadfence_system();
    poke(record + REASON, reason);
  }
  return false;
}

// One thread's waiting.
struct Watch {
  Head* head;
  u32* page;
  u64 patience_ns;
  int rank, operation;
  u32 spins = 0;
  Memory memory;

  __device__ Watch(char* region, u32* page, u64 patience_ns, i64 rank, i64 operation)
      : head(reinterpret_cast<Head*>(region)), page(page), patience_ns(patience_ns),
        rank(static_cast<int>(rank)), operation(static_cast<int>(operation)) {}

  // Whether to try once more for what `peer` has to write.
  __device__ __forceinline__ bool goes_on(int peer) {
    return ++spins % SPINS_A_LOOK ? true : look(head, page, patience_ns, rank, operation, peer, memory);
  }
};

struct Call { u64 number; bool is_alive; };

__device__ __forceinline__ Call next_call(const Head* head) {
  u64 count, rest;
  asm volatile("ld.volatile.global.v2.u64 {%0,%1}, [%2];" : "=l"(count), "=l"(rest) : "l"(head) : "memory");
  return Call{count + 1, static_cast<u32>(rest) == 0};
}
// By one thread of each block, after all its threads have read the count: the last block to come counts up.
// Returns whether this is it.
__device__ __forceinline__ bool count_up(Head* head, u64 number) {
  if (atomicAdd(&head->arrived, 1u) != gridDim.x - 1) return false;
  poke(&head->arrived, 0u);
  asm volatile("st.volatile.global.u64 [%0], %1;" : : "l"(&head->count), "l"(number) : "memory");
  return true;
}

// --- small sums, as words ---

__device__ __forceinline__ u32 tag_of(u64 number) { return static_cast<u32>(number) | 0x80000000u; }

__device__ __forceinline__ i64 words_of(const Group& g, u64 number, int from, i64 pack_index) {
  return g.words_at + ((number & 1) * g.size + from) * g.words_slot + pack_index * 32;
}

template <int SIZE>
__device__ __forceinline__ void push_words(const Group& g, u64 number, i64 pack_index, const Bits& bits) {
  const u32 tag = tag_of(number);
  const int rank = static_cast<int>(g.rank), size = static_cast<int>(g.size);
  const i64 at = words_of(g, number, rank, pack_index);
#pragma unroll
  for (int hop = 1; hop < SIZE; ++hop) {
    if (hop >= size) break;
    const int peer = rank + hop < size ? rank + hop : rank + hop - size;
    write_line(g.region[peer] + at, Bits{{bits.at[0], tag, bits.at[1], tag}});
    write_line(g.region[peer] + at + 16, Bits{{bits.at[2], tag, bits.at[3], tag}});
  }
}

// Waits for all ranks' words of a pack and adds them in rank order. False: given up.
template <typename T, int SIZE>
__device__ __forceinline__ bool sum_words(const Group& g, u64 number, i64 pack_index, const Bits& own,
                                          Values<T>& sum, Watch& watch) {
  constexpr int WIDE = SIZE < 4 ? SIZE : 4;  // reads in flight together
  const u32 tag = tag_of(number);
  const int rank = static_cast<int>(g.rank), size = static_cast<int>(g.size);
  const char* region = g.region[rank];
#pragma unroll
  for (int low = 0; low < SIZE; low += WIDE) {
    Bits part[WIDE];
    int missing;
    do {
      missing = -1;
      Bits a[WIDE], b[WIDE];
#pragma unroll
      for (int k = 0; k < WIDE; ++k)
        if (low + k < size && low + k != rank) {
          const char* from = region + words_of(g, number, low + k, pack_index);
          a[k] = read_line(from);
          b[k] = read_line(from + 16);
        }
#pragma unroll
      for (int k = 0; k < WIDE; ++k) {
        if (low + k >= size) continue;
        if (low + k == rank) {
          part[k] = own;
        } else {
          if (a[k].at[1] != tag || a[k].at[3] != tag || b[k].at[1] != tag || b[k].at[3] != tag) missing = low + k;
          part[k] = Bits{{a[k].at[0], a[k].at[2], b[k].at[0], b[k].at[2]}};
        }
      }
    } while (missing >= 0 && watch.goes_on(static_cast<int>(g.first) + missing));
    if (missing >= 0) return false;
#pragma unroll
    for (int k = 0; k < WIDE; ++k)
      if (low + k < size) add_part<T>(sum, part[k], low + k == 0);
  }
  return true;
}

template <typename T, int SIZE> __device__ void all_reduce_one_shot(T* x, i64 count, const Group& g) {
  constexpr int N = 16 / sizeof(T);
  let_next_start();
  wait_for_previous();
  char* region = g.region[g.rank];
  Head* head = reinterpret_cast<Head*>(region);
  const i64 first = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  // Read at the same time as the count; for a short message it is all there is.
  const Bits mine = load_bits(x + first * N, count - first * N);
  const Call call = next_call(head);
  if (call.is_alive)
    for (i64 i = first; i * N < count; i += step)
      push_words<SIZE>(g, call.number, i, i == first ? mine : load_bits(x + i * N, count - i * N));
  if (!__syncthreads_and(call.is_alive)) return;
  if (threadIdx.x == 0) count_up(head, call.number);
  Watch watch(region, g.page, g.patience_ns, g.first + g.rank, g.operation);
  for (i64 i = first; i * N < count; i += step) {
    Values<T> sum;
    const Bits own = i == first ? mine : load_bits(x + i * N, count - i * N);
    if (!sum_words<T, SIZE>(g, call.number, i, own, sum, watch)) return;
    store_bits(x + i * N, count - i * N, pack(sum));
  }
}

// residual += the sum of x over the group; out = norm(residual) * weight. Rounds where an all-reduce, an addition
// and a norm would. A block makes whole rows; `width` is whole packs.
template <typename T, int CHUNKS, int SIZE>
__device__ void all_reduce_norm(const T* x, T* residual, const T* weight, T* out, i64 rows, int width, float eps,
                                const Group& g) {
  constexpr int N = 16 / sizeof(T);
  let_next_start();
  Bits weights;
  const int packs = width / N, lane = threadIdx.x;
  if (CHUNKS == 1 && lane < packs) weights = load_bits(weight + lane * N, N);
  wait_for_previous();
  char* region = g.region[g.rank];
  Head* head = reinterpret_cast<Head*>(region);
  const i64 first = static_cast<i64>(blockIdx.x) * packs + lane;  // pack of the block's first row
  const Bits mine = load_bits(x + first * N, lane < packs ? N : 0);
  const Call call = next_call(head);
  if (call.is_alive)
    for (i64 row = blockIdx.x; row < rows; row += gridDim.x)
      for (int i = lane; i < packs; i += blockDim.x) {
        const i64 at = row * packs + i;
        push_words<SIZE>(g, call.number, at, at == first ? mine : load_bits(x + at * N, N));
      }
  if (!__syncthreads_and(call.is_alive)) return;
  if (lane == 0) count_up(head, call.number);
  Watch watch(region, g.page, g.patience_ns, g.first + g.rank, g.operation);
  for (i64 row = blockIdx.x; row < rows; row += gridDim.x) {
    Values<T> kept[CHUNKS];
    float squares = 0.0f;
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int i = c * blockDim.x + lane;
      if (i >= packs) continue;
      const i64 at = row * width + i * N;
      unpack(load_bits(residual + at, N), kept[c]);
      const Bits own = row * packs + i == first ? mine : load_bits(x + at, N);
      Values<T> sum;
      // Threads that gave up go on to the block's sum, where the others are.
      if (!sum_words<T, SIZE>(g, call.number, row * packs + i, own, sum, watch)) continue;
#pragma unroll
      for (int k = 0; k < N; ++k)
        kept[c].at[k] = to_float(from_float<T>(kept[c].at[k] + to_float(from_float<T>(sum.at[k]))));
      store_bits(residual + at, N, pack(kept[c]));
#pragma unroll
      for (int k = 0; k < N; ++k) squares += kept[c].at[k] * kept[c].at[k];
    }
    const float scale = rsqrtf(block_sum(squares) / width + eps);
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int i = c * blockDim.x + lane;
      if (i >= packs) continue;
      if (CHUNKS > 1) weights = load_bits(weight + i * N, N);
      Values<T> w;
      unpack(weights, w);
#pragma unroll
      for (int k = 0; k < N; ++k) w.at[k] = kept[c].at[k] * scale * w.at[k];
      store_bits(out + row * width + i * N, N, pack(w));
    }
    __syncthreads();  // the block's sum is used again
  }
}

// --- larger messages, written plainly ---

__device__ __forceinline__ i64 flag_of(u64 number, int phase, int from) {
  return FLAGS_AT + ((((number & 1) * 2 + phase) * MOST_RANKS + from) * MOST_BLOCKS + blockIdx.x) * 8;
}
__device__ __forceinline__ i64 slot_of(const Group& g, u64 number, int phase, int from) {
  return g.plain_at + (((number & 1) * 2 + phase) * g.size + from) * g.plain_slot;
}
// By the whole block, after a barrier behind its writes: tells the same block of every peer.
__device__ __forceinline__ void signal(const Group& g, u64 number, int phase) {
  if (threadIdx.x < g.size && threadIdx.x != g.rank)
    release(g.region[threadIdx.x] + flag_of(number, phase, static_cast<int>(g.rank)), number);
}
// By the whole block: waits for the same block of every peer. False on all threads: given up.
__device__ __forceinline__ bool hear(const Group& g, u64 number, int phase) {
  bool is_here = true;
  if (threadIdx.x < g.size && threadIdx.x != g.rank) {
    const int from = threadIdx.x;
    char* region = g.region[g.rank];
    Watch watch(region, g.page, g.patience_ns, g.first + g.rank, g.operation);
    while (is_here && acquire(region + flag_of(number, phase, from)) != number)
      is_here = watch.goes_on(static_cast<int>(g.first) + from);
  }
  return __syncthreads_and(is_here);
}

// By the whole block, behind its pushes: meets the same block of every peer. False: over.
__device__ __forceinline__ bool meet(const Group& g, const Call& call) {
  if (!__syncthreads_and(call.is_alive)) return false;
  signal(g, call.number, 0);
  if (threadIdx.x == 0) count_up(reinterpret_cast<Head*>(g.region[g.rank]), call.number);
  return hear(g, call.number, 0);
}

// Pushes pieces to their ranks' slots and meets. `piece(rank)` is an address; `left(rank)` its elements. False: over.
template <typename T, typename Piece, typename Left>
__device__ __forceinline__ bool push_pieces(const Group& g, const Call& call, Piece piece, Left left) {
  constexpr int N = 16 / sizeof(T);
  const int rank = static_cast<int>(g.rank), size = static_cast<int>(g.size);
  const i64 first = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  const i64 slot = slot_of(g, call.number, 0, rank);
  if (call.is_alive)
    for (int hop = 1; hop < size; ++hop) {
      const int peer = rank + hop < size ? rank + hop : rank + hop - size;
      const T* from = piece(peer);
      const i64 count = left(peer);
      char* to = g.region[peer] + slot;
      for (i64 i = first; i * N < count; i += step) write_line(to + i * 16, load_bits(from + i * N, count - i * N));
    }
  return meet(g, call);
}

// The sum, in rank order, of what was pushed here for pack i and of this rank's own.
template <typename T, int SIZE>
__device__ __forceinline__ Bits sum_slots(const Group& g, u64 number, i64 i, const Bits& own) {
  const int rank = static_cast<int>(g.rank), size = static_cast<int>(g.size);
  Bits part[SIZE];
#pragma unroll
  for (int r = 0; r < SIZE; ++r)
    if (r < size) part[r] = r == rank ? own : read_line(g.region[rank] + slot_of(g, number, 0, r) + i * 16);
  Values<T> sum;
#pragma unroll
  for (int r = 0; r < SIZE; ++r)
    if (r < size) add_part<T>(sum, part[r], r == 0);
  return pack(sum);
}

// Each rank sums one share of x, then hands it to all.
template <typename T, int SIZE> __device__ void all_reduce_two_shot(T* x, i64 count, const Group& g) {
  constexpr int N = 16 / sizeof(T);
  let_next_start();
  wait_for_previous();
  const int rank = static_cast<int>(g.rank), size = static_cast<int>(g.size);
  char* region = g.region[rank];
  const Call call = next_call(reinterpret_cast<Head*>(region));
  const i64 share = ((count + N - 1) / N + size - 1) / size * N;
  const i64 first = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x;
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  auto left = [&](int r) { return count - r * share < share ? count - r * share : share; };
  if (!push_pieces<T>(g, call, [&](int r) { return x + r * share; }, left)) return;

  const i64 mine = left(rank), slot = slot_of(g, call.number, 1, rank);
  for (i64 i = first; i * N < mine; i += step) {
    T* at = x + rank * share + i * N;
    const Bits bits = sum_slots<T, SIZE>(g, call.number, i, load_bits(at, mine - i * N));
    for (int hop = 1; hop < size; ++hop) {
      const int peer = rank + hop < size ? rank + hop : rank + hop - size;
      write_line(g.region[peer] + slot + i * 16, bits);
    }
    store_bits(at, mine - i * N, bits);
  }
  __syncthreads();
  signal(g, call.number, 1);
  if (!hear(g, call.number, 1)) return;
  for (int hop = 1; hop < size; ++hop) {
    const int peer = rank + hop < size ? rank + hop : rank + hop - size;
    const i64 theirs = left(peer), from = slot_of(g, call.number, 1, peer);
    for (i64 i = first; i * N < theirs; i += step)
      store_bits(x + peer * share + i * N, theirs - i * N, read_line(region + from + i * 16));
  }
}

// out = the sum of this rank's piece of x; the pieces are `stride` elements apart.
template <typename T, int SIZE>
__device__ void reduce_scatter(const T* x, T* out, i64 stride, i64 count, const Group& g) {
  constexpr int N = 16 / sizeof(T);
  let_next_start();
  wait_for_previous();
  const Call call = next_call(reinterpret_cast<Head*>(g.region[g.rank]));
  if (!push_pieces<T>(g, call, [&](int r) { return x + r * stride; }, [&](int) { return count; })) return;
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  const T* mine = x + g.rank * stride;
  for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i * N < count; i += step)
    store_bits(out + i * N, count - i * N,
               sum_slots<T, SIZE>(g, call.number, i, load_bits(mine + i * N, count - i * N)));
}

// Copies what every rank pushed here, and this rank's own piece, to where `place(rank, pack)` says.
template <typename T, typename Place, typename Left>
__device__ __forceinline__ void take_pieces(const Group& g, const Call& call, const T* own, Place place, Left left) {
  constexpr int N = 16 / sizeof(T);
  const int rank = static_cast<int>(g.rank), size = static_cast<int>(g.size);
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  for (int r = 0; r < size; ++r) {
    const i64 count = left(r);
    const char* slot = g.region[rank] + slot_of(g, call.number, 0, r);
    for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i * N < count; i += step)
      store_bits(place(r, i), count - i * N,
                 r == rank ? load_bits(own + i * N, count - i * N) : read_line(slot + i * 16));
  }
}

template <typename T> __device__ void all_gather(const T* x, T* out, i64 stride, i64 count, const Group& g) {
  constexpr int N = 16 / sizeof(T);
  let_next_start();
  wait_for_previous();
  const Call call = next_call(reinterpret_cast<Head*>(g.region[g.rank]));
  auto all = [&](int) { return count; };
  if (!push_pieces<T>(g, call, [&](int) { return x; }, all)) return;
  take_pieces<T>(g, call, x, [&](int r, i64 i) { return out + r * stride + i * N; }, all);
}

// The same, row by row: x [rows, packs] goes to out [rows, size, packs], `packs` of 16 bytes.
__device__ __forceinline__ void gather_by_row(const u32* x, u32* out, i64 rows, int packs, const Group& g) {
  let_next_start();
  wait_for_previous();
  const Call call = next_call(reinterpret_cast<Head*>(g.region[g.rank]));
  auto all = [&](int) { return rows * packs * 4; };
  if (!push_pieces<u32>(g, call, [&](int) { return x; }, all)) return;
  auto place = [&](int r, i64 i) { return out + ((i / packs * g.size + r) * packs + i % packs) * 4; };
  take_pieces<u32>(g, call, x, place, all);
}

// Attention to contexts whose parts the ranks keep. found [tokens, size, heads, dim]: what this rank's parts give, by
// the rank whose heads they are; lse [tokens, size, heads]: the base-2 logarithms of the softmaxes' denominators, NONE
// for an empty part. out [tokens, heads, dim]: this rank's heads over all parts, which are added in rank order. A token
// is one block's, here and there. `dim` is whole packs.
template <typename T, int SIZE>
__device__ void merge_parts(const T* found, const float* lse, T* out, i64 tokens, int heads, int dim, const Group& g) {
  constexpr int N = 16 / sizeof(T);
  let_next_start();
  wait_for_previous();
  const int rank = static_cast<int>(g.rank), size = static_cast<int>(g.size);
  const int packs = heads * dim / N, lines = packs + (heads + 3) / 4;  // that a token takes in a slot
  char* region = g.region[rank];
  const Call call = next_call(reinterpret_cast<Head*>(region));
  const i64 slot = slot_of(g, call.number, 0, rank);
  if (call.is_alive)
    for (int hop = 1; hop < size; ++hop) {
      const int peer = rank + hop < size ? rank + hop : rank + hop - size;
      for (i64 token = blockIdx.x; token < tokens; token += gridDim.x) {
        char* to = g.region[peer] + slot + token * lines * 16;
        const T* means = found + (token * size + peer) * packs * N;
        const float* sums = lse + (token * size + peer) * heads;
        for (int i = threadIdx.x; i < lines; i += blockDim.x) {
          const int head = (i - packs) * 4;
          write_line(to + i * 16, i < packs ? load_bits(means + i * N, N) : load_bits(sums + head, heads - head));
        }
      }
    }
  if (!meet(g, call)) return;
  for (i64 token = blockIdx.x; token < tokens; token += gridDim.x) {
    const i64 own = token * size + rank;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
      const int head = i * N / dim;
      Bits part[SIZE];
      float sums[SIZE], top = NONE;
#pragma unroll
      for (int r = 0; r < SIZE; ++r) {
        sums[r] = NONE;
        if (r >= size) continue;
        const char* from = region + slot_of(g, call.number, 0, r) + token * lines * 16;
        if (r == rank) {
          part[r] = load_bits(found + (own * packs + i) * N, N);
          sums[r] = lse[own * heads + head];
        } else {
          part[r] = read_line(from + i * 16);
          sums[r] = __uint_as_float(peek(reinterpret_cast<const u32*>(from + packs * 16) + head));
        }
        top = fmaxf(top, sums[r]);
      }
      Values<T> sum = {};
      float total = 0.0f;
#pragma unroll
      for (int r = 0; r < SIZE; ++r) {
        if (r >= size) continue;
        const float weight = weight_of(sums[r], top);
        Values<T> x;
        unpack(part[r], x);
        total += weight;
#pragma unroll
        for (int k = 0; k < N; ++k) sum.at[k] += weight * x.at[k];
      }
      const float inverse = total > 0.0f ? 1.0f / total : 0.0f;
#pragma unroll
      for (int k = 0; k < N; ++k) sum.at[k] *= inverse;
      store_bits(out + (token * packs + i) * N, N, pack(sum));
    }
  }
}

template <typename T> __device__ void all_to_all(const T* x, T* out, const Deal& d) {
  constexpr int N = 16 / sizeof(T);
  let_next_start();
  wait_for_previous();
  const Group& g = d.group;
  const Call call = next_call(reinterpret_cast<Head*>(g.region[g.rank]));
  if (!push_pieces<T>(g, call, [&](int r) { return x + d.send_at[r]; }, [&](int r) { return d.send[r]; })) return;
  take_pieces<T>(g, call, x + d.send_at[g.rank], [&](int r, i64 i) { return out + d.take_at[r] + i * N; },
                 [&](int r) { return d.take[r]; });
}

// --- messages between stages ---

// Gives a message; waits while the slot still holds one that was not taken.
template <typename T> __device__ void give(const T* x, i64 count, const Lane& l) {
  constexpr int N = 16 / sizeof(T);
  let_next_start();
  wait_for_previous();
  Head* head = reinterpret_cast<Head*>(l.own + l.head_at);
  const u64 number = next_call(head).number;
  Watch watch(l.own, l.page, l.patience_ns, l.rank, l.operation);
  bool is_free = peek(&watch.head->error) == 0;
  if (threadIdx.x == 0)
    while (is_free && static_cast<i64>(number - acquire(l.own + l.taken_at)) > l.depth)
      is_free = watch.goes_on(static_cast<int>(l.peer));
  if (!__syncthreads_and(is_free)) return;
  const i64 slot = static_cast<i64>(number % l.depth);
  char* to = l.other + l.slots_at + slot * l.slot_bytes;
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i * N < count; i += step)
    write_line(to + i * 16, load_bits(x + i * N, count - i * N));
  __syncthreads();
  if (threadIdx.x) return;
  release(l.other + l.flags_at + (slot * MOST_BLOCKS + blockIdx.x) * 8, number);
  count_up(head, number);
}

template <typename T> __device__ void take(T* out, i64 count, const Lane& l) {
  constexpr int N = 16 / sizeof(T);
  let_next_start();
  wait_for_previous();
  Head* head = reinterpret_cast<Head*>(l.own + l.head_at);
  const u64 number = next_call(head).number;
  const i64 slot = static_cast<i64>(number % l.depth);
  Watch watch(l.own, l.page, l.patience_ns, l.rank, l.operation);
  bool is_here = peek(&watch.head->error) == 0;
  if (threadIdx.x == 0)
    while (is_here && acquire(l.own + l.flags_at + (slot * MOST_BLOCKS + blockIdx.x) * 8) != number)
      is_here = watch.goes_on(static_cast<int>(l.peer));
  if (!__syncthreads_and(is_here)) return;
  const char* from = l.own + l.slots_at + slot * l.slot_bytes;
  const i64 step = static_cast<i64>(gridDim.x) * blockDim.x;
  for (i64 i = static_cast<i64>(blockIdx.x) * blockDim.x + threadIdx.x; i * N < count; i += step)
    store_bits(out + i * N, count - i * N, read_line(from + i * 16));
  __syncthreads();
  if (threadIdx.x) return;
  __threadfence();
  if (count_up(head, number)) release(l.other + l.taken_at, number);
}

#define SUMS(NAME, T, SIZE)                                                                                    \
  extern "C" __global__ void __launch_bounds__(512) all_reduce_one_shot_##NAME##_##SIZE(T* x, i64 count, Group g) { \
    all_reduce_one_shot<T, SIZE>(x, count, g);                                                                 \
  }                                                                                                            \
  extern "C" __global__ void __launch_bounds__(512) all_reduce_two_shot_##NAME##_##SIZE(T* x, i64 count, Group g) { \
    all_reduce_two_shot<T, SIZE>(x, count, g);                                                                 \
  }                                                                                                            \
  extern "C" __global__ void __launch_bounds__(512) reduce_scatter_##NAME##_##SIZE(                            \
      const T* x, T* out, i64 stride, i64 count, Group g) {                                                    \
    reduce_scatter<T, SIZE>(x, out, stride, count, g);                                                         \
  }                                                                                                            \
  extern "C" __global__ void __launch_bounds__(512) merge_parts_##NAME##_##SIZE(                               \
      const T* found, const float* lse, T* out, i64 tokens, int heads, int dim, Group g) {                     \
    merge_parts<T, SIZE>(found, lse, out, tokens, heads, dim, g);                                              \
  }
SUMS(bf16, bf16, 2)
SUMS(bf16, bf16, 4)
SUMS(bf16, bf16, 8)
SUMS(f32, float, 2)
SUMS(f32, float, 4)
SUMS(f32, float, 8)

#define NORMS(NAME, T, CHUNKS, SIZE)                                                                           \
  extern "C" __global__ void __launch_bounds__(512) all_reduce_norm_##NAME##_##CHUNKS##_##SIZE(                \
      const T* x, T* residual, const T* weight, T* out, i64 rows, int width, float eps, Group g) {             \
    all_reduce_norm<T, CHUNKS, SIZE>(x, residual, weight, out, rows, width, eps, g);                           \
  }
#define ALL_NORMS(NAME, T, CHUNKS) NORMS(NAME, T, CHUNKS, 2) NORMS(NAME, T, CHUNKS, 4) NORMS(NAME, T, CHUNKS, 8)
ALL_NORMS(bf16, bf16, 1)
ALL_NORMS(bf16, bf16, 2)
ALL_NORMS(bf16, bf16, 4)
ALL_NORMS(f32, float, 1)
ALL_NORMS(f32, float, 2)
ALL_NORMS(f32, float, 4)

#define COPIES(NAME, T)                                                                                        \
  extern "C" __global__ void __launch_bounds__(512) all_gather_##NAME(const T* x, T* out, i64 stride, i64 count, \
                                                                     Group g) {                                \
    all_gather<T>(x, out, stride, count, g);                                                                   \
  }                                                                                                            \
  extern "C" __global__ void __launch_bounds__(512) all_to_all_##NAME(const T* x, T* out, Deal d) {            \
    all_to_all<T>(x, out, d);                                                                                  \
  }                                                                                                            \
  extern "C" __global__ void __launch_bounds__(512) give_##NAME(const T* x, i64 count, Lane l) {               \
    give<T>(x, count, l);                                                                                      \
  }                                                                                                            \
  extern "C" __global__ void __launch_bounds__(512) take_##NAME(T* out, i64 count, Lane l) {                   \
    take<T>(out, count, l);                                                                                    \
  }
extern "C" __global__ void __launch_bounds__(512) gather_rows(const u32* x, u32* out, i64 rows, int packs, Group g) {
  gather_by_row(x, out, rows, packs, g);
}
COPIES(u32, u32)
COPIES(u8, unsigned char)
