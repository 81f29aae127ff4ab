//! Texts that are much alike, held short: as what each says otherwise than a sample of them.

use std::sync::Arc;

use lz4_flex::block;

/// So much of texts a sample takes in, in bytes. Whatever is in it is looked up by one of 4096 hashes, one for every third byte:
/// more would push out what came first.
const SAMPLE: usize = 12 * 1024;

/// A sample of texts. What a text has in common with it takes next to nothing.
#[derive(Debug, Default)]
pub(crate) struct Sample(Box<[u8]>);

impl Sample {
    /// A sample of these, of the first ones if they are too many.
    pub(crate) fn of(texts: impl IntoIterator<Item = Vec<u8>>) -> Self {
        let mut sample = Vec::new();
        for text in texts {
            let room = SAMPLE - sample.len();
            sample.extend_from_slice(text.get(..room).unwrap_or(&text));
        }
        Self(sample.into())
    }
}

/// A text, held short.
#[derive(Clone, Debug)]
pub(crate) struct Short {
    /// The length of the text in four bytes, and an LZ4 block that has the sample for its dictionary.
    bytes: Box<[u8]>,
    sample: Arc<Sample>,
}

impl Short {
    /// `None` when it could not be read back as it is.
    pub(crate) fn new(text: &[u8], sample: &Arc<Sample>) -> Option<Self> {
        let mut bytes = u32::try_from(text.len()).ok()?.to_le_bytes().to_vec();
        let head = bytes.len();
        bytes.resize(head + block::get_maximum_output_size(text.len()), 0);
        let room = &mut bytes[head..];
        let length = match &*sample.0 {
            [] => block::compress_into(text, room).ok()?,
            sample => block::compress_into_with_dict(text, room, sample).ok()?,
        };
        // A copy has no room to spare.
        let short = Self { bytes: bytes[..head + length].into(), sample: sample.clone() };
        (short.text()? == text).then_some(short)
    }

    /// The text.
    pub(crate) fn text(&self) -> Option<Vec<u8>> {
        let (length, block) = self.bytes.split_first_chunk()?;
        let mut text = vec![0; usize::try_from(u32::from_le_bytes(*length)).ok()?];
        let filled = block::decompress_into_with_dict(block, &mut text, &self.sample.0).ok()?;
        (filled == text.len()).then_some(text)
    }

    /// Whether it was held against this sample.
    pub(crate) fn is_against(&self, sample: &Arc<Sample>) -> bool {
        Arc::ptr_eq(&self.sample, sample)
    }

    /// How many bytes it takes.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_like_the_sample_takes_little() {
        let text = |name: &str| {
            let fields: Vec<String> =
                (0..40).map(|number| format!("\"field{number}\":\"value {}\"", number * 7919)).collect();
            format!("{{\"name\":\"{name}\",{}}}", fields.join(",")).into_bytes()
        };
        let sample = Arc::new(Sample::of([text("one"), text("two")]));
        let short = Short::new(&text("another"), &sample).unwrap();
        assert_eq!(short.text().unwrap(), text("another"));
        assert!(short.len() < 64, "{} of {}", short.len(), text("another").len());
        assert!(short.is_against(&sample) && !short.is_against(&Arc::default()));
    }

    proptest! {
        #[test]
        fn it_is_read_as_it_was(
            texts in proptest::collection::vec(proptest::collection::vec(0_u8..4, 0..9000), 0..4),
            text in proptest::collection::vec(0_u8..4, 0..3000),
            from in any::<proptest::sample::Index>(),
        ) {
            // Of what is in the sample, and of what is not.
            let mut both = texts.first().map(|first| first[from.index(first.len() + 1).min(first.len())..].to_vec()).unwrap_or_default();
            both.extend(&text);
            let sample = Arc::new(Sample::of(texts));
            for text in [text, both] {
                let short = Short::new(&text, &sample);
                prop_assert_eq!(short.expect("it can be held short").text(), Some(text));
            }
        }
    }
}
