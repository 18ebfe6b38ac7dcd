// SPDX-License-Identifier: GPL-2.0 OR MIT OR Apache-2.0
//
// The job of vxcsum's TC program, written by hand in C with libbpf, for the bench to compare with; not
// used by anything else. It takes the same configuration, fills the same counters, sends the same events
// and writes the same two bytes (`vxcsum-common/src/layout.rs`).
//
// It leaves out what no packet of the bench needs: tunnels in tunnels, devices without a link header,
// packets whose headers are not linear, flows that are followed, the debug log.
//
// With -DLEGACY it does what the object for kernels without the ring buffer does: events by perf event
// array, no global data, no offload state, no number of segments.

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

char LICENSE[] SEC("license") = "Dual MIT/GPL";

/* Of IPv6, RFC 8200 section 4; <linux/in6.h> does not go with <linux/in.h>. */
#define IPPROTO_HOPOPTS 0
#define IPPROTO_ROUTING 43
#define IPPROTO_FRAGMENT 44
#define IPPROTO_DSTOPTS 60

enum verdict { ZERO, MISSING, PENDING, VALID, MANGLED_ZERO, STALE_NAT, BAD, UNVERIFIED, VERDICTS };
enum report { NONE, EMITTED, SUPPRESSED, LOST, REPORTS };
enum policy { POLICY_UNKNOWN, POLICY_ZERO, POLICY_SUM };
enum seen { SEEN_ZERO = 1, SEEN_SUM = 2 };
enum fix { FIX_OFF, FIX_ZERO, FIX_RESTORE };
enum action { ACTION_NONE, ZEROED, RESTORED, REFUSED_UNPROVEN, REFUSED_IPV6, REFUSED_UNKNOWN_SUM,
	      REFUSED_WRITE_FAILED };
enum proof { PROOF_NONE, FLOW_HASH, FLOW_HASH_AND_ADDRESS, PORT_RANGE };

#define SLOTS 64
#define SLOT_SHIFT 16
#define ANY_VNI 0xffffffff
#define MASQUERADE_MARK 0x4000
#define BURST_NS 1000000000ULL
#define SNAPSHOT_LEN 256
#define MAX_TAGS 2
#define MAX_EXTENSIONS 6
#define CHUNK_LEN 512
#define MAX_CHUNKS 18
#define OFFSET_MASK 0x3fff

struct port {
	__u16 port;
	__u8 policy[2];
	__u8 by_vni;
	__u8 seen[2];
	__u8 reserved;
};

struct config {
	__u32 seed;
	__u32 reserved;
	struct port slots[SLOTS];
	__u8 fix;
	__u8 fix_unproven;
	__u8 is_raw_ip;
	__u8 following;
	__u32 max_frame_len;
	__u32 zero[2];
	__u32 event_cost_ns;
};

struct tally {
	__u64 skbs;
	__u64 further_segments;
	__u64 bytes;
};

struct counters {
	__u64 not_vxlan;
	struct tally tallies[VERDICTS][REPORTS];
	__u64 zeroed;
	__u64 restored;
};

struct device_key {
	__u32 vni;
	__u32 port;
};

struct device {
	__u8 local_ipv4[4];
	__u8 local_ipv6[16];
	__u16 source_port_min;
	__u16 source_port_max;
	__u8 policy[2];
	__u8 reserved[2];
};

struct event {
	__u64 boot_ns;
	__u32 len;
	__u32 segments;
	__u32 mark;
	__u16 check;
	__u16 expected;
	__u16 source_port_before_nat;
	__u16 snapshot_len;
	__u8 verdict;
	__u8 action;
	__u8 proof;
	__u8 policy;
	__u8 ip_summed;
	__u8 is_followed;
	__u8 reserved[2];
	__u32 held_back;
	__u8 snapshot[SNAPSHOT_LEN];
	__u32 padding;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct counters);
} COUNTERS SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, struct device_key);
	__type(value, struct device);
} DEVICES SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} PAID_UNTIL SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, __u64);
	__type(value, __u8);
} FLOWS SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u8[CHUNK_LEN + 4]);
} CHUNK SEC(".maps");

#ifdef LEGACY
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct config);
} CONFIG SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__uint(key_size, 4);
	__uint(value_size, 4);
} EVENTS SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct event);
} DRAFT SEC(".maps");
#else
struct config config SEC(".data.config");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 20);
} EVENTS SEC(".maps");
#endif

static __always_inline struct config *get_config(void)
{
#ifdef LEGACY
	__u32 zero = 0;

	return bpf_map_lookup_elem(&CONFIG, &zero);
#else
	return &config;
#endif
}

/* Fields of the context are read by an instruction of their own: LLVM would add to the pointer before a
 * branch, and the verifier takes no sum for the context. */
#define FIELD(skb, name)                                                                    \
	({                                                                                  \
		__u64 field;                                                                \
		asm volatile("%0 = *(u32 *)(%1 + %2)"                                       \
			     : "=r"(field)                                                  \
			     : "r"(skb), "i"(__builtin_offsetof(struct __sk_buff, name)));  \
		(__u32)field;                                                               \
	})

static __always_inline __u32 known_segments(const struct __sk_buff *skb, const struct config *config)
{
#ifdef LEGACY
	return FIELD(skb, len) <= config->max_frame_len;
#else
	__u32 segments = FIELD(skb, gso_segs);

	(void)config;
	return segments ? segments : 1;
#endif
}

static __always_inline __u32 wire_len(const struct __sk_buff *skb)
{
#ifdef LEGACY
	return FIELD(skb, len);
#else
	return FIELD(skb, wire_len);
#endif
}

static __always_inline __u16 fold(__u64 sum)
{
	sum = (sum >> 32) + (sum & 0xffffffff);
	sum = (sum >> 16) + (sum & 0xffff);
	sum = (sum >> 16) + (sum & 0xffff);
	sum = (sum >> 16) + (sum & 0xffff);
	return sum;
}

/* The value of a checksum field, as it lies in memory. */
static __always_inline __u16 to_check(__u64 sum)
{
	__u16 check = ~fold(sum);

	return check ? check : 0xffff;
}

#define LOAD16(at) (*(const __u16 *)(at))
#define LOAD32(at) (*(const __u32 *)(at))

static __always_inline __u64 sum20(const __u8 *at)
{
	return (__u64)LOAD32(at) + LOAD32(at + 4) + LOAD32(at + 8) + LOAD32(at + 12) + LOAD32(at + 16);
}

/* What is known of an IP header; offsets from the start of the packet, network byte order where
 * nothing else is said. */
struct ip {
	__u32 at;
	__u32 payload;
	__u32 end;
	__u8 is_ipv6;
	__u8 protocol;
	__u8 is_fragment;
	__u8 is_later_fragment;
	__u8 segments_left;
	__u64 addresses;
};

struct packet {
	struct __sk_buff *skb;
	const __u8 *data;
	const __u8 *data_end;
};

static __always_inline const __u8 *reach(const struct packet *packet, __u32 at, __u32 len)
{
	const __u8 *start = packet->data + (at & OFFSET_MASK);

	return start + len > packet->data_end ? NULL : start;
}

/* The EtherType behind up to two tags, in host byte order; moves `at` behind them. */
static __always_inline int parse_ethernet(const struct packet *packet, __u32 *at)
{
	const __u8 *ethernet = reach(packet, *at, ETH_HLEN);
	__u16 ethertype;

	if (!ethernet)
		return -1;
	ethertype = bpf_ntohs(LOAD16(ethernet + 12));
	*at += ETH_HLEN;
	for (int tag = 0; tag < MAX_TAGS; tag++) {
		const __u8 *vlan;

		if (ethertype != ETH_P_8021Q && ethertype != ETH_P_8021AD && ethertype != ETH_P_QINQ1)
			break;
		vlan = reach(packet, *at, 4);
		if (!vlan)
			return -1;
		ethertype = bpf_ntohs(LOAD16(vlan + 2));
		*at += 4;
	}
	return ethertype;
}

/* Looks through the extension headers from `protocol` at `at` on. Returns -1 where one is out of reach;
 * otherwise what follows them, `segments_left` in bits 8 to 15, their length in bits 16 to 31, whether it
 * is a fragment in bit 32 and whether a later one in bit 33. A global function: the verifier walks it
 * once. */
__noinline __s64 parse_extensions(struct __sk_buff *skb, __u32 protocol, __u32 at)
{
	struct packet packet = { skb, (void *)(long)skb->data, (void *)(long)skb->data_end };
	__u64 segments_left = 0, is_fragment = 0, is_later = 0;
	__u32 len = 0;

	for (int count = 0; count < MAX_EXTENSIONS && !is_later; count++) {
		const __u8 *header;

		if (protocol != IPPROTO_HOPOPTS && protocol != IPPROTO_ROUTING &&
		    protocol != IPPROTO_FRAGMENT && protocol != IPPROTO_AH &&
		    protocol != IPPROTO_DSTOPTS)
			break;
		header = reach(&packet, at + len, 8);
		if (!header)
			return -1;
		if (protocol == IPPROTO_FRAGMENT) {
			is_later = (LOAD16(header + 2) & bpf_htons(0xfff8)) != 0;
			is_fragment = (LOAD16(header + 2) & bpf_htons(0xfff9)) != 0;
			len += 8;
		} else if (protocol == IPPROTO_AH) {
			len += (header[1] + 2) * 4;
		} else {
			if (protocol == IPPROTO_ROUTING)
				segments_left |= header[3];
			len += (header[1] + 1) * 8;
		}
		protocol = header[0];
	}
	return (__u8)protocol | segments_left << 8 | (__u64)(len & 0xffff) << 16 | is_fragment << 32 |
	       is_later << 33;
}

/* 1 for an IP header, 0 for none, -1 for one out of reach. */
static __always_inline int parse_ip(const struct packet *packet, int ethertype, __u32 at, struct ip *ip)
{
	const __u8 *header;
	__s64 extensions;

	ip->at = at;
	ip->segments_left = 0;
	if (ethertype == ETH_P_IP) {
		__u32 header_len;

		header = reach(packet, at, 20);
		if (!header)
			return -1;
		header_len = (header[0] & 0xf) * 4;
		if (header[0] >> 4 != 4 || header_len < 20)
			return 0;
		ip->is_ipv6 = 0;
		ip->protocol = header[9];
		ip->payload = at + header_len;
		ip->end = at + bpf_ntohs(LOAD16(header + 2));
		ip->is_fragment = (LOAD16(header + 6) & bpf_htons(0x3fff)) != 0;
		ip->is_later_fragment = (LOAD16(header + 6) & bpf_htons(0x1fff)) != 0;
		ip->addresses = (__u64)LOAD32(header + 12) + LOAD32(header + 16);
		return 1;
	}
	if (ethertype == ETH_P_IPV6) {
		header = reach(packet, at, 40);
		if (!header)
			return -1;
		if (header[0] >> 4 != 6)
			return 0;
		ip->is_ipv6 = 1;
		ip->protocol = header[6];
		ip->payload = at + 40;
		ip->end = at + 40 + bpf_ntohs(LOAD16(header + 4));
		ip->is_fragment = 0;
		ip->is_later_fragment = 0;
		ip->addresses = (__u64)LOAD32(header + 8) + LOAD32(header + 12) + LOAD32(header + 16) +
				LOAD32(header + 20) + LOAD32(header + 24) + LOAD32(header + 28) +
				LOAD32(header + 32) + LOAD32(header + 36);
		if (ip->protocol == IPPROTO_UDP || ip->protocol == IPPROTO_TCP)
			return 1;
		extensions = parse_extensions(packet->skb, ip->protocol, ip->payload);
		if (extensions < 0)
			return -1;
		ip->protocol = extensions;
		ip->segments_left = extensions >> 8;
		ip->payload += extensions >> 16 & 0xffff;
		ip->is_fragment = extensions >> 32 & 1;
		ip->is_later_fragment = extensions >> 33 & 1;
		return 1;
	}
	return 0;
}

/* The sum of `len` bytes at `at`, wherever they lie; -1 where that cannot be told. A global function, so
 * that the verifier walks it once. */
__noinline __s64 sum_bytes(struct __sk_buff *skb, __u32 at, __u32 len)
{
	__u32 zero = 0, chunks = len / CHUNK_LEN, rest = len % CHUNK_LEN;
	__u8 *chunk = bpf_map_lookup_elem(&CHUNK, &zero);
	__s64 sum = 0;

	if (!chunk || chunks > MAX_CHUNKS)
		return -1;
	for (__u32 index = 0; index < MAX_CHUNKS; index++) {
		if (index == chunks)
			break;
		if (bpf_skb_load_bytes(skb, at + index * CHUNK_LEN, chunk, CHUNK_LEN))
			return -1;
		sum = bpf_csum_diff(NULL, 0, (__be32 *)chunk, CHUNK_LEN, sum);
	}
	if (!rest)
		return (__u32)sum;
	rest = ((rest - 1) & (CHUNK_LEN - 1)) + 1;
	if (bpf_skb_load_bytes(skb, at + chunks * CHUNK_LEN, chunk, rest))
		return -1;
	chunk[rest] = 0;
	chunk[rest + 1] = 0;
	chunk[rest + 2] = 0;
	sum = bpf_csum_diff(NULL, 0, (__be32 *)chunk, (rest + 3) & ~3, sum);
	return (__u32)sum;
}

/* The outer headers of a VXLAN packet. */
struct outer {
	struct ip ip;
	__u32 udp_len;
	__u16 source_port; /* host byte order */
	__u16 port; /* host byte order */
	__u16 check; /* as it lies in memory */
	__u32 vni;
	__u64 pseudo_header;
	__u64 headers;
};

/* The inner headers, as far as the outer sum depends on them. */
struct inner {
	__u8 is_open;
	__u16 lco; /* as it lies in memory */
};

static __always_inline __u64 fnv(__u64 hash, __u32 word)
{
	return (hash ^ word) * 0x00000100000001b3ULL;
}

/* 0, or -1 where a header is out of reach. */
static __always_inline int parse_inner(const struct packet *packet, const struct outer *outer,
				       struct inner *inner)
{
	__u32 frame = outer->ip.payload + 16, at = frame, check_at, len;
	const __u8 *ethernet, *header, *field;
	__u64 pseudo_header, before;
	int ethertype, is_ip;
	struct ip ip;

	inner->is_open = 0;
	inner->lco = 0;
	ethertype = parse_ethernet(packet, &at);
	if (ethertype < 0)
		return -1;
	is_ip = parse_ip(packet, ethertype, at, &ip);
	if (is_ip <= 0)
		return is_ip;
	if (ip.protocol == IPPROTO_TCP)
		check_at = ip.payload + 16;
	else if (ip.protocol == IPPROTO_UDP)
		check_at = ip.payload + 6;
	else
		return 0;
	if (ip.is_fragment || ip.segments_left || check_at + 2 > ip.end ||
	    ip.end > outer->ip.payload + outer->udp_len)
		return 0;
	field = reach(packet, check_at, 2);
	if (!field)
		return -1;
	if (ip.protocol == IPPROTO_UDP && LOAD16(field) == 0)
		return 0;
	len = ip.end - ip.payload;
	pseudo_header = ip.addresses + bpf_htons(ip.protocol) + bpf_htons(len);
	ethernet = reach(packet, frame, ETH_HLEN);
	header = reach(packet, ip.at, 20);
	if (!ethernet || !header)
		return -1;
	before = (__u64)LOAD32(ethernet) + LOAD32(ethernet + 4) + LOAD32(ethernet + 8) +
		 LOAD16(ethernet + 12) + sum20(header);
	if (ip.is_ipv6) {
		header = reach(packet, ip.at + 20, 20);
		if (!header)
			return -1;
		before += sum20(header);
	}
	if (ip.at > frame + ETH_HLEN) {
		__s64 tags = sum_bytes(packet->skb, frame + ETH_HLEN, ip.at - frame - ETH_HLEN);

		if (tags < 0)
			return -1;
		before += tags;
	}
	if (ip.payload > ip.at + (ip.is_ipv6 ? 40 : 20)) {
		__u32 fixed = ip.at + (ip.is_ipv6 ? 40 : 20);
		__s64 options = sum_bytes(packet->skb, fixed, ip.payload - fixed);

		if (options < 0)
			return -1;
		before += options;
	}
	inner->is_open = LOAD16(field) == fold(pseudo_header);
	before += outer->pseudo_header + outer->headers + (__u16)~fold(pseudo_header);
	inner->lco = to_check(before);
	return 0;
}

static __always_inline void add(struct __sk_buff *skb, const struct config *config, struct tally *tally)
{
	__u32 segments = known_segments(skb, config);

	tally->skbs += 1;
	if (segments > 1)
		tally->further_segments += segments - 1;
	tally->bytes += wire_len(skb);
}

static __always_inline struct device find_device(__u16 port, __u32 vni)
{
	struct device unknown = { .source_port_min = 32768, .source_port_max = 60999 };
	struct device_key key = { .vni = vni, .port = port };
	struct device *device = bpf_map_lookup_elem(&DEVICES, &key);

	if (device)
		return *device;
	key.vni = ANY_VNI;
	device = bpf_map_lookup_elem(&DEVICES, &key);
	if (device)
		return *device;
	return unknown;
}

static __always_inline int is_zero(__u64 sum)
{
	__u16 folded = fold(sum);

	return folded == 0 || folded == 0xffff;
}

/* The ones' complement negative. */
static __always_inline __u64 negative(__u64 sum)
{
	return (__u16)~fold(sum);
}

static __always_inline enum proof prove_nat(struct __sk_buff *skb, const struct packet *packet,
					    const struct outer *outer, __u16 expected, __u16 *old)
{
	struct device device = find_device(outer->port, outer->vni);
	__u16 min = device.source_port_min;
	__u16 max = device.source_port_max;
	__u64 width = max > min ? max - min : 0;
	__u64 error = (__u64)outer->check + negative(expected);
	__u64 new_port = bpf_htons(outer->source_port);
	__u64 hash = FIELD(skb, hash);
	__u16 ports[2];

	if (!hash && width > 1) {
		__u16 port = bpf_ntohs(fold(new_port + negative(error)));

		if (!(FIELD(skb, mark) & MASQUERADE_MARK) || port < min || port > max)
			return PROOF_NONE;
		*old = port;
		return PORT_RANGE;
	}
	hash ^= (hash << 16) & 0xffffffff;
	ports[0] = min + (hash * width >> 32);
	ports[1] = hash ? min + (hash * (width + 1) >> 32) : min + width;
	for (int index = 0; index < 2; index++) {
		__u64 change = new_port + negative(bpf_htons(ports[index]));

		if (is_zero(error + negative(change))) {
			*old = ports[index];
			return FLOW_HASH;
		}
	}
	if (!outer->ip.is_ipv6) {
		const __u8 *address = reach(packet, outer->ip.at + 12, 4);
		__u64 local = LOAD32(device.local_ipv4);
		__u64 new_address;

		if (!address)
			return PROOF_NONE;
		new_address = LOAD32(address);
		if (!local)
			return PROOF_NONE;
		for (int index = 0; index < 2; index++) {
			__u64 change = new_port + negative(bpf_htons(ports[index]));

			change += 2 * (new_address + negative(local));
			if (is_zero(error + negative(change))) {
				*old = ports[index];
				return FLOW_HASH_AND_ADDRESS;
			}
		}
	}
	return PROOF_NONE;
}

static __always_inline int may_send_event(const struct packet *packet, const struct outer *outer,
					  const struct config *config)
{
	__u32 zero = 0, frame = outer->ip.payload + 16, at = frame;
	__u64 now, from, ahead, flow, *paid_until;
	const __u8 *ends;
	__u8 one = 1;
	struct ip ip;
	int is_repeat;

	if (!config->event_cost_ns)
		return 1;
	paid_until = bpf_map_lookup_elem(&PAID_UNTIL, &zero);
	if (!paid_until)
		return 1;
	now = bpf_ktime_get_ns();
	from = *paid_until > now ? *paid_until : now;
	ahead = from - now;
	if (ahead >= BURST_NS)
		return 0;
	flow = fnv(0xcbf29ce484222325ULL, outer->vni);
	if (parse_ip(packet, parse_ethernet(packet, &at), at, &ip) == 1 && !ip.is_ipv6) {
		flow = fnv(flow, ip.protocol);
		ends = reach(packet, ip.at + 12, 8);
		if (ends)
			flow = fnv(fnv(flow, bpf_ntohl(LOAD32(ends))), bpf_ntohl(LOAD32(ends + 4)));
		ends = reach(packet, ip.payload, 4);
		if (ends)
			flow = fnv(flow, bpf_ntohl(LOAD32(ends)));
	}
	is_repeat = bpf_map_lookup_elem(&FLOWS, &flow) != NULL;
	if (is_repeat && ahead >= BURST_NS / 2)
		return 0;
	*paid_until = from + config->event_cost_ns;
	if (!is_repeat)
		bpf_map_update_elem(&FLOWS, &flow, &one, 0);
	return 1;
}

static __always_inline enum action apply(struct __sk_buff *skb, const struct outer *outer,
					 const struct config *config, enum verdict verdict,
					 __u16 expected, struct counters *counters)
{
	__u16 check = verdict == MANGLED_ZERO ? 0 : expected;
	__u32 segments = known_segments(skb, config);

	if (config->fix == FIX_OFF)
		return ACTION_NONE;
	if (verdict == BAD && !config->fix_unproven)
		return REFUSED_UNPROVEN;
	if (config->fix == FIX_ZERO && outer->ip.is_ipv6)
		return REFUSED_IPV6;
	if (verdict != MANGLED_ZERO && !expected)
		return REFUSED_UNKNOWN_SUM;
	if (config->fix == FIX_ZERO)
		check = 0;
	if (bpf_skb_store_bytes(skb, outer->ip.payload + 6, &check, 2, 0))
		return REFUSED_WRITE_FAILED;
	if (config->fix == FIX_ZERO) {
		counters->zeroed += segments ? segments : 1;
		return ZEROED;
	}
	counters->restored += segments ? segments : 1;
	return RESTORED;
}

static __always_inline void fill(struct event *event, struct __sk_buff *skb, const struct outer *outer,
				 const struct config *config, enum verdict verdict, enum policy policy,
				 enum proof proof, __u16 expected, __u16 old_port)
{
	__u32 len = skb->len < SNAPSHOT_LEN ? skb->len : SNAPSHOT_LEN;

	len = ((len - 1) & (SNAPSHOT_LEN - 1)) + 1;
#ifdef LEGACY
	event->boot_ns = bpf_ktime_get_ns();
#else
	event->boot_ns = bpf_ktime_get_boot_ns();
#endif
	event->len = skb->len;
	event->segments = known_segments(skb, config);
	event->mark = FIELD(skb, mark);
	event->check = bpf_ntohs(outer->check);
	event->expected = bpf_ntohs(expected);
	event->source_port_before_nat = old_port;
	event->snapshot_len = bpf_skb_load_bytes(skb, 0, event->snapshot, len) ? 0 : len;
	event->verdict = verdict;
	event->proof = proof;
	event->policy = policy;
	event->ip_summed = 255;
	event->is_followed = 0;
	event->reserved[0] = 0;
	event->reserved[1] = 0;
	event->held_back = 0;
}

static __always_inline enum report report(struct __sk_buff *skb, const struct packet *packet,
					  const struct outer *outer, const struct config *config,
					  enum verdict verdict, enum policy policy, enum proof proof,
					  __u16 expected, __u16 old_port, struct counters *counters)
{
	struct event *event;

	if (!may_send_event(packet, outer, config)) {
		apply(skb, outer, config, verdict, expected, counters);
		return SUPPRESSED;
	}
#ifdef LEGACY
	__u32 zero = 0;

	event = bpf_map_lookup_elem(&DRAFT, &zero);
#else
	event = bpf_ringbuf_reserve(&EVENTS, sizeof(*event), 0);
#endif
	if (!event) {
		apply(skb, outer, config, verdict, expected, counters);
		return LOST;
	}
	fill(event, skb, outer, config, verdict, policy, proof, expected, old_port);
	event->action = apply(skb, outer, config, verdict, expected, counters);
#ifdef LEGACY
	if (bpf_perf_event_output(skb, &EVENTS, BPF_F_CURRENT_CPU, event, sizeof(*event)))
		return LOST;
#else
	bpf_ringbuf_submit(event, 0);
#endif
	return EMITTED;
}

static __always_inline enum policy policy_of(const struct port *port, int is_ipv6, __u32 vni)
{
	enum policy policy = port->policy[is_ipv6];
	__u8 seen = port->seen[is_ipv6];

	if (port->by_vni) {
		struct device device = find_device(port->port, vni);

		return is_ipv6 ? device.policy[1] : device.policy[0];
	}
	if (policy == POLICY_UNKNOWN && seen == SEEN_ZERO)
		return POLICY_ZERO;
	if (policy == POLICY_UNKNOWN && seen == SEEN_SUM)
		return POLICY_SUM;
	return policy;
}

static __always_inline void settle(struct __sk_buff *skb, const struct config *config,
				   struct counters *counters, struct port *port, int is_ipv6,
				   enum verdict verdict)
{
	__u8 lesson = verdict == ZERO || verdict == MISSING    ? SEEN_ZERO :
		      verdict == PENDING || verdict == VALID ? SEEN_SUM :
							       0;

	if (port->policy[is_ipv6] == POLICY_UNKNOWN && (port->seen[is_ipv6] & lesson) != lesson)
		port->seen[is_ipv6] |= lesson;
	add(skb, config, &counters->tallies[verdict][NONE]);
}

/* Where an outer header is a VXLAN one to a watched port, what it holds; and the port. 0 where it is
 * none, -1 where it cannot be told. */
static __always_inline int parse_outer(const struct packet *packet, struct config *config,
				       struct outer *outer, struct port **port)
{
	const __u8 *udp, *vxlan;
	__u32 at = 0;
	int ethertype = parse_ethernet(packet, &at);

	if (ethertype < 0 || parse_ip(packet, ethertype, at, &outer->ip) != 1 ||
	    outer->ip.protocol != IPPROTO_UDP || outer->ip.is_later_fragment)
		return 0;
	udp = reach(packet, outer->ip.payload, 8);
	if (!udp)
		return 0;
	outer->port = bpf_ntohs(LOAD16(udp + 2));
	*port = &config->slots[(outer->port * config->seed >> SLOT_SHIFT) & (SLOTS - 1)];
	if ((*port)->port != outer->port)
		return 0;
	vxlan = reach(packet, outer->ip.payload + 8, 8);
	if (!vxlan)
		return -1;
	if (!(vxlan[0] & 0x08))
		return 0;
	outer->udp_len = bpf_ntohs(LOAD16(udp + 4));
	if (outer->ip.is_fragment || outer->ip.segments_left || outer->udp_len < 16 ||
	    outer->ip.payload + outer->udp_len > outer->ip.end ||
	    outer->ip.payload + outer->udp_len > FIELD(packet->skb, len))
		return -1;
	outer->vni = bpf_ntohl(LOAD32(vxlan + 4)) >> 8;
	outer->check = LOAD16(udp + 6);
	outer->pseudo_header = outer->ip.addresses + bpf_htons(IPPROTO_UDP) + LOAD16(udp + 4);
	outer->source_port = bpf_ntohs(LOAD16(udp));
	outer->headers = (__u64)LOAD32(udp) + LOAD16(udp + 4) + LOAD32(vxlan) + LOAD32(vxlan + 4);
	return 1;
}

/* What is wrong with a packet that is not right by its headers. A global function, as `sum_bytes`. */
__noinline int examine_wrong(struct __sk_buff *skb, __u32 is_open, __u32 lco)
{
	struct packet packet = { skb, (void *)(long)skb->data, (void *)(long)skb->data_end };
	struct config *config = get_config();
	enum proof proof = PROOF_NONE;
	__u16 expected = 0, old_port = 0;
	struct counters *counters;
	enum verdict verdict;
	enum policy policy;
	enum report told;
	struct outer outer;
	struct port *port;
	__u32 zero = 0;

	counters = bpf_map_lookup_elem(&COUNTERS, &zero);
	if (!counters || !config || parse_outer(&packet, config, &outer, &port) != 1)
		return 0;
	policy = policy_of(port, outer.ip.is_ipv6, outer.vni);
	if (known_segments(skb, config) == 1) {
		__s64 sum = sum_bytes(skb, outer.ip.payload, outer.udp_len);

		if (sum < 0 && !is_open) {
			settle(skb, config, counters, port, outer.ip.is_ipv6, UNVERIFIED);
			return 0;
		}
		sum += outer.pseudo_header;
		if (is_zero(sum)) {
			settle(skb, config, counters, port, outer.ip.is_ipv6, VALID);
			return 0;
		}
		expected = is_open ? lco : to_check(sum + negative(outer.check));
	}
	if (policy == POLICY_ZERO) {
		verdict = MANGLED_ZERO;
	} else {
		if (expected)
			proof = prove_nat(skb, &packet, &outer, expected, &old_port);
		verdict = proof == PROOF_NONE ? BAD : STALE_NAT;
	}
	told = report(skb, &packet, &outer, config, verdict, policy, proof, expected, old_port, counters);
	add(skb, config, &counters->tallies[verdict & (VERDICTS - 1)][told & (REPORTS - 1)]);
	return 0;
}

static __always_inline void examine(struct __sk_buff *skb)
{
	struct packet packet = { skb, (void *)(long)skb->data, (void *)(long)skb->data_end };
	struct config *config = get_config();
	struct counters *counters;
	enum verdict verdict;
	struct outer outer;
	struct inner inner;
	struct port *port;
	__u32 zero = 0;
	int found;

	counters = bpf_map_lookup_elem(&COUNTERS, &zero);
	if (!counters || !config)
		return;
	found = parse_outer(&packet, config, &outer, &port);
	if (!found) {
		counters->not_vxlan += 1;
		return;
	}
	if (found < 0)
		verdict = UNVERIFIED;
	else if (!outer.check)
		verdict = policy_of(port, outer.ip.is_ipv6, outer.vni) == POLICY_SUM ? MISSING : ZERO;
	else if (outer.check == fold(outer.pseudo_header))
		verdict = PENDING;
	else if (parse_inner(&packet, &outer, &inner))
		verdict = UNVERIFIED;
	else if (inner.is_open && inner.lco == outer.check && known_segments(skb, config) == 1)
		verdict = VALID;
	else {
		examine_wrong(skb, inner.is_open, inner.lco);
		return;
	}
	settle(skb, config, counters, port, outer.ip.is_ipv6, verdict);
}

SEC("classifier")
int vxcsum_egress(struct __sk_buff *skb)
{
	examine(skb);
	return TC_ACT_UNSPEC;
}
