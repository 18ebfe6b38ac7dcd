//! The words of the common crate's codes in JSON.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serializer};

/// Makes a module for `#[serde(with = …)]` out of a type that lists all its values and names them.
macro_rules! by_name {
    ($module:ident, $type:ty) => {
        #[doc = concat!("[`", stringify!($type), "`] by its name.")]
        pub mod $module {
            use super::*;

            pub(crate) fn serialize<S: Serializer>(
                value: &$type,
                serializer: S,
            ) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(value.as_str())
            }

            pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
                deserializer: D,
            ) -> Result<$type, D::Error> {
                let name = String::deserialize(deserializer)?;
                <$type>::ALL
                    .into_iter()
                    .find(|value| value.as_str() == name)
                    .ok_or_else(|| D::Error::custom(format!("unknown name {name:?}")))
            }
        }
    };
}

by_name!(verdict, vxcsum_common::Verdict);
by_name!(action, vxcsum_common::layout::Action);
by_name!(fix_mode, vxcsum_common::layout::FixMode);
by_name!(method, crate::attach::Method);
by_name!(transport, crate::transport::Transport);

/// [`crate::attach::Method`] by its name, or null.
pub mod optional_method {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::attach::Method;

    #[derive(Deserialize, Serialize)]
    struct Named(#[serde(with = "super::method")] Method);

    #[expect(
        clippy::ref_option,
        clippy::trivially_copy_pass_by_ref,
        reason = "the signature is serde's"
    )]
    pub(crate) fn serialize<S: Serializer>(
        value: &Option<Method>,
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        value.map(Named).serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Option<Method>, D::Error> {
        Ok(Option::<Named>::deserialize(deserializer)?.map(|Named(method)| method))
    }
}
