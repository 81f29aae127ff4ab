//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// An Ethernet address; written and read as `02:00:5e:00:53:01` (upper case and `-` are read too).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// All stations.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// A locally administered unicast address made of the first six bytes of `seed` (missing ones are zero): the same
    /// seed always gives the same address.
    pub fn local(seed: &[u8]) -> Self {
        let mut bytes = [0; 6];
        for (to, from) in bytes.iter_mut().zip(seed) {
            *to = *from;
        }
        bytes[0] = (bytes[0] & 0xfc) | 0x02;
        Self(bytes)
    }

    /// Whether it names one station (the group bit is clear).
    pub fn is_unicast(&self) -> bool {
        self.0[0] & 1 == 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for Mac {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::Invalid(format!("{text:?} is not an Ethernet address (six hex pairs separated by ':')"));
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(bad)?;
            if !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Self(bytes)) }
    }
}

impl TryFrom<String> for Mac {
    type Error = Error;

    fn try_from(text: String) -> Result<Self, Error> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes_and_refuses_the_rest() {
        let mac: Mac = "02:00:5E-00:53:01".parse().unwrap();
        assert_eq!(mac.to_string(), "02:00:5e:00:53:01");
        for bad in
            ["", "02:00:5e:00:53", "02:00:5e:00:53:01:02", "02:00:5e:00:53:0g", "2:0:5:0:5:1", "+2:00:5e:00:53:01"]
        {
            assert!(bad.parse::<Mac>().is_err(), "{bad}");
        }
        assert!(Mac::local(&[0xff, 1, 2]).is_unicast());
        assert_eq!(Mac::local(&[0xff, 1, 2]), Mac([0xfe, 1, 2, 0, 0, 0]));
    }
}
