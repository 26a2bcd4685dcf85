//! Stop strings: ends a text where one begins, also when it spans several tokens.
//!
//! Text that might be the beginning of a stop string is held back until it is known not to be.

/// The text of a generation, as far as it may be shown.
#[derive(Debug)]
pub(crate) struct StopBuffer<'a> {
    stops: &'a [String],
    longest: usize,
    text: String,
    /// Bytes of `text` shown so far.
    shown: usize,
    stopped: bool,
}

impl<'a> StopBuffer<'a> {
    /// A buffer with room for `capacity` bytes. Empty stop strings are ignored.
    pub(crate) fn new(stops: &'a [String], capacity: usize) -> StopBuffer<'a> {
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        StopBuffer { stops, longest, text: String::with_capacity(capacity), shown: 0, stopped: false }
    }

    /// Where new text is appended; call [`StopBuffer::advance`] after.
    pub(crate) fn text_mut(&mut self) -> &mut String {
        &mut self.text
    }

    /// What may be shown of the text that has not been.
    pub(crate) fn advance(&mut self) -> &str {
        let from = self.shown;
        if let Some(at) = self.find() {
            self.text.truncate(at);
            self.stopped = true;
            self.shown = at;
        } else {
            self.shown = self.text.len() - self.held_back();
        }
        self.text.get(from..self.shown).unwrap_or_default()
    }

    /// Whether a stop string was found.
    pub(crate) fn stopped(&self) -> bool {
        self.stopped
    }

    /// Shows what was held back.
    pub(crate) fn release(&mut self) -> &str {
        let from = std::mem::replace(&mut self.shown, self.text.len());
        self.text.get(from..).unwrap_or_default()
    }

    /// The last `len` bytes of what was shown.
    pub(crate) fn tail(&self, len: usize) -> &str {
        self.text.get(self.shown.saturating_sub(len)..self.shown).unwrap_or_default()
    }

    pub(crate) fn into_text(self) -> String {
        self.text
    }

    /// Where the first stop string begins. Everything shown is known to be in none.
    fn find(&self) -> Option<usize> {
        let rest = self.text.get(self.shown..)?;
        let stops = self.stops.iter().filter(|s| !s.is_empty());
        stops.filter_map(|s| rest.find(s.as_str())).min().map(|at| self.shown + at)
    }

    /// Bytes at the end that a stop string might begin with.
    fn held_back(&self) -> usize {
        let most = self.longest.saturating_sub(1).min(self.text.len() - self.shown);
        (1..=most)
            .rev()
            .find(|n| {
                let end = self.text.as_bytes().get(self.text.len() - n..).unwrap_or_default();
                self.stops.iter().any(|s| s.len() > *n && s.as_bytes().starts_with(end))
            })
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[&str], pieces: &[&str]) -> (Vec<String>, String, bool) {
        let stops: Vec<String> = stops.iter().map(|s| (*s).to_owned()).collect();
        let mut b = StopBuffer::new(&stops, 0);
        let mut shown = Vec::new();
        for p in pieces {
            b.text_mut().push_str(p);
            shown.push(b.advance().to_owned());
            if b.stopped() {
                break;
            }
        }
        if !b.stopped() {
            shown.push(b.release().to_owned());
        }
        let stopped = b.stopped();
        (shown, b.into_text(), stopped)
    }

    #[test]
    fn a_stop_across_pieces_is_found_and_never_shown() {
        let (shown, text, stopped) = run(&["END"], &["a", "bE", "N", "Dc"]);
        assert_eq!(
            (shown.as_slice(), text.as_str(), stopped),
            (&["a", "b", "", ""].map(str::to_owned)[..], "ab", true)
        );
    }

    #[test]
    fn a_false_alarm_is_shown_later() {
        let (shown, text, stopped) = run(&["END"], &["E", "N", "d", "E"]);
        assert_eq!(shown, ["", "", "ENd", "", "E"]);
        assert_eq!((text.as_str(), stopped), ("ENdE", false));
    }

    #[test]
    fn the_earliest_stop_wins() {
        assert_eq!(run(&["bc", "abcd"], &["xabcd"]).1, "x");
        assert_eq!(run(&["", "z"], &["xyz"]).1, "xy");
        assert_eq!(run(&[], &["xyz"]), (vec!["xyz".into(), String::new()], "xyz".into(), false));
    }

    #[test]
    fn characters_are_not_split_by_what_is_held_back() {
        // The stop string's second character shares its first byte with é.
        let (shown, text, _) = run(&["aè"], &["aé", "b"]);
        assert_eq!(shown.concat(), text);
        assert_eq!(text, "aéb");
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(text in "[abé]{0,24}", stops in proptest::collection::vec("[abé]{1,4}", 0..3), cuts in proptest::collection::vec(0usize..24, 0..6)) {
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|c| text.is_char_boundary(*c)).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&str> = cuts.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
            let (shown, kept, stopped) = run(&stops, &pieces);
            prop_assert_eq!(shown.concat(), kept.clone());
            prop_assert_eq!(stopped, stops.iter().any(|s| text.contains(s)));
            if stopped {
                prop_assert!(text.starts_with(&kept));
                prop_assert!(stops.iter().all(|s| !kept.contains(s)));
            } else {
                prop_assert_eq!(kept, text);
            }
        }
    }
}
