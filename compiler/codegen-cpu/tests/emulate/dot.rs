//! What `vpdpbusd` computes.

/// For each 32-bit lane: `acc` plus four products of unsigned bytes of `a` with signed bytes of `b`, wrapping.
pub(crate) fn vpdpbusd<const BYTES: usize>(acc: [u8; BYTES], a: [u8; BYTES], b: [u8; BYTES]) -> [u8; BYTES] {
    let mut out = acc;
    for lane in (0..BYTES).step_by(4) {
        let mut sum = i32::from_le_bytes([acc[lane], acc[lane + 1], acc[lane + 2], acc[lane + 3]]);
        for i in lane..lane + 4 {
            sum = sum.wrapping_add(i32::from(a[i]) * i32::from(b[i] as i8));
        }
        out[lane..lane + 4].copy_from_slice(&sum.to_le_bytes());
    }
    out
}
